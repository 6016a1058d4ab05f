"""llama.cpp through llama-cpp-python's low-level calls.

Prompts go in batches of --step-tokens, then every unfinished sequence gets one token a call, as from its own server.
Widths: bf16, f32, q8_0, q4_0 (GGUF files made by gguf_file.py)."""

from pathlib import Path

from worker_protocol import Generate, arguments, serve

args = arguments(__doc__ or "")


def start() -> tuple[Generate, str, dict[str, object]]:
    import ctypes

    import llama_cpp
    import numpy as np
    from gguf_file import write_gguf

    file = Path(args.cache) / f"{Path(args.model).name}-{args.width}.gguf"
    if not file.exists():
        write_gguf(Path(args.model), file, args.width)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = -(-args.kv_tokens // 256) * 256
    params.n_batch = params.n_ubatch = max(args.step_tokens, args.max_seqs)
    params.n_seq_max = args.max_seqs
    params.n_threads = params.n_threads_batch = args.threads
    if hasattr(params, "kv_unified"):
        params.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama_init_from_model gave nothing")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    memory = llama_cpp.llama_get_memory(context)

    def decode(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """rows of (token, position, sequence, whether its next token is wanted) -> next token by sequence."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        found = {}
        for i, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, i)
                address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocab)).contents
                found[sequence] = int(np.frombuffer(address, dtype=np.float32).argmax())
        return found

    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        llama_cpp.llama_memory_clear(memory, True)
        made: dict[int, list[int]] = {sequence: [] for sequence in range(len(prompts))}
        rows = [(t, i, s, i + 1 == len(p)) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        for begin in range(0, len(rows), args.step_tokens):
            for sequence, token in decode(rows[begin : begin + args.step_tokens]).items():
                made[sequence].append(token)
        while left := [s for s, found in made.items() if len(found) < tokens[s]]:
            last = [(made[s][-1], len(prompts[s]) + len(made[s]) - 1, s, True) for s in left]
            for sequence, token in decode(last).items():
                made[sequence].append(token)
        return list(made.values())

    return generate, llama_cpp.__version__, {"file_bytes": file.stat().st_size}


serve(start)
