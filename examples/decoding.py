"""Everything one may ask of decoding, for one prompt: greedy, samples, beams, logprobs, stop strings, biases, bans.

python examples/decoding.py                  the bundled model
python examples/decoding.py --model DIR      a folder with config.json, *.safetensors and tokenizer.json
"""

import argparse

from mini_vllm import LLM, BeamSearchParams, CompletionOutput, SamplingParams

PROMPT = "class Stack:\n    def __init__(self):\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the bundled model")
    llm = LLM(parser.parse_args().model)
    print(PROMPT)

    def complete(title: str, **params: object) -> list[CompletionOutput]:
        (output,) = llm.generate(PROMPT, SamplingParams(**{"max_tokens": 24} | params), use_tqdm=False)  # type: ignore[arg-type]
        print(f"--- {title}")
        for completion in output.outputs:
            reason = completion.stop_reason if completion.stop_reason is not None else completion.finish_reason
            print(f"[{completion.index}] {completion.text!r}  ({reason!r})")
        return output.outputs

    (greedy,) = complete("greedy", temperature=0.0)
    complete("four samples with a seed: the prompt is computed once", n=4, temperature=0.8, top_p=0.95, seed=0)

    print("--- beam search, four beams, best first")
    (beams,) = llm.beam_search(PROMPT, BeamSearchParams(beam_width=4, max_tokens=24))
    for beam in beams.sequences:
        print(f"{beam.score:8.4f} {(beam.text or '')[len(PROMPT) :]!r}")

    (completion,) = complete("the likeliest five at each of four positions", temperature=0.0, max_tokens=4, logprobs=5)
    for position in completion.logprobs or ():
        print("    " + "  ".join(f"{e.decoded_token!r} {e.logprob:.2f} (#{e.rank})" for e in position.values()))
    print(f"    cumulative logprob {completion.cumulative_logprob:.4f}")

    stop = greedy.text.strip()[3:7]  # from the middle of a word to the middle of another
    complete(f"until the stop string {stop!r}, wherever tokens begin", temperature=0.0, stop=[stop])
    complete("and with it", temperature=0.0, stop=[stop], include_stop_str_in_output=True)

    first = greedy.token_ids[0]
    complete(f"token {first}, the greedy first, made less likely", temperature=0.0, logit_bias={first: -20.0})
    complete("without the words 'self' and 'None'", temperature=0.0, bad_words=["self", "None"])
    complete("less of what is there already", temperature=0.0, repetition_penalty=1.3, max_tokens=40)


if __name__ == "__main__":
    main()
