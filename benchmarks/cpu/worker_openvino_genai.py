"""OpenVINO GenAI's continuous batching, with the model exported by optimum-intel on first use.

Widths: f32, bf16 (where OpenVINO says that this CPU computes in it), int8 (symmetric, per channel), int4 (symmetric,
groups of 32; the head in 8 bits)."""

import os
from pathlib import Path

from worker_protocol import Generate, arguments, serve

os.environ.update(HF_HUB_OFFLINE="1", OPENVINO_TELEMETRY="0")
args = arguments(__doc__ or "")


def export(folder: Path) -> None:
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    quantization = {
        "int8": OVWeightQuantizationConfig(bits=8, sym=True),
        "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0),
    }.get(args.width)
    model = OVModelForCausalLM.from_pretrained(
        args.model, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    model.save_pretrained(folder)
    for name, part in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(AutoTokenizer.from_pretrained(args.model), with_detokenizer=True),
        strict=True,
    ):
        ov.save_model(part, folder / f"openvino_{name}.xml")


def start() -> tuple[Generate, str, dict[str, object]]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    if args.width == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("OpenVINO computes in float32 on this CPU whatever it is asked for")
    folder = Path(args.cache) / f"{Path(args.model).name}-openvino-{args.width}"
    if not (folder / "openvino_detokenizer.xml").exists():
        export(folder)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 2, args.max_seqs, args.step_tokens
    scheduler.enable_prefix_caching = False
    options: dict[str, object] = {"INFERENCE_NUM_THREADS": args.threads}
    if args.width in ("bf16", "f32"):
        options["INFERENCE_PRECISION_HINT"] = args.width
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", options)

    def config(tokens: int) -> object:
        found = genai.GenerationConfig()
        found.max_new_tokens = found.min_new_tokens = tokens
        found.ignore_eos, found.do_sample = True, False
        return found

    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        ids = [ov.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        outputs = pipeline.generate(ids, [config(n) for n in tokens])
        return [list(output.m_generation_ids[0]) for output in outputs]

    size = (folder / "openvino_model.bin").stat().st_size
    return generate, genai.__version__, {"openvino": ov.__version__, "file_bytes": size}


serve(start)
