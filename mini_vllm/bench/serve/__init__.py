"""`mini-vllm bench serve`: a load generator for any server that speaks OpenAI's or Anthropic's API.

options.py (what was asked) -> datasets.py (prompts) and schedule.py (when) -> runner.py, over connection.py and
backends.py (send, note when tokens arrive) -> metrics.py -> result.py and report.py.
"""
