"""Batch files of the OpenAI format through the server's own handlers.

lines.py reads the input, runner.py has each line answered, output.py writes what comes back in the order of the input
and knows how to go on after a kill.
"""
