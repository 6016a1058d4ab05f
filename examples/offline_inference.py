"""Complete several prompts at once and print what came out.

python examples/offline_inference.py                  the bundled model
python examples/offline_inference.py --model DIR      a folder with config.json, *.safetensors and tokenizer.json
"""

import argparse

from mini_vllm import LLM, SamplingParams

PROMPTS = [
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    'def is_even(n):\n    """Return True if',
    "for key, value in ",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the bundled model")
    llm = LLM(parser.parse_args().model)

    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=48, seed=0)
    for output in llm.generate(PROMPTS, params):
        completion = output.outputs[0]
        print(f"--- {output.prompt!r}  ({len(completion.token_ids)} tokens, {completion.finish_reason})")
        print(completion.text)

    # One set of parameters for each prompt, and prompts as token ids, work as well.
    ids = llm.get_tokenizer().encode("import os\nimport ")
    greedy, free = SamplingParams(temperature=0.0, max_tokens=8), SamplingParams(temperature=1.0, max_tokens=8, seed=1)
    for output in llm.generate([{"prompt_token_ids": ids}, {"prompt_token_ids": ids}], [greedy, free], use_tqdm=False):
        print(output.outputs[0].token_ids, repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
