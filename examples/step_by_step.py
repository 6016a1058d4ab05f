"""Drive the engine one step at a time: stream deltas, join late, abort, and ask why a request waits.

python examples/step_by_step.py
"""

from mini_vllm import EngineArgs, LLMEngine, RequestOutputKind, SamplingParams

PARAMS = SamplingParams(temperature=0.6, max_tokens=12, seed=0, output_kind=RequestOutputKind.DELTA)


def main() -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(max_num_seqs=2))
    for request_id, prompt in {"first": "def add(a, b):", "second": "class Queue:", "third": "import os"}.items():
        engine.add_request(request_id, prompt, PARAMS)

    while engine.has_unfinished_requests():
        outputs = engine.step()
        record = engine.step_records(1)[0]
        print(f"step {record.step_id}: {record.num_scheduled_tokens}")
        for output in outputs:
            print(f"    {output.request_id}: {output.outputs[0].text!r} {output.outputs[0].finish_reason or ''}")
        for request_id, reason in engine.waiting_reasons().items():
            print(f"    {request_id} waits: {reason}")
        if record.step_id == 5:
            engine.abort_request("second")  # its place goes to the third


if __name__ == "__main__":
    main()
