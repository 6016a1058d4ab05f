"""An installed wheel brings a kernel library for every level of its machine, loads the best one without a compiler,
and computes with it: a norm as torch computes it, then tokens of the bundled model. Run by cibuildwheel.
"""

import torch

import mini_vllm
from mini_vllm import LLM, SamplingParams
from mini_vllm.ops.cpu import build, library
from mini_vllm.ops.norm import rms_norm, rms_norm_reference


def main() -> None:
    present = {path.name for path in build.PACKAGE_LIBRARY_DIR.glob("*.so")}
    missing = [isa for isa in build.levels_of_machine() if build.library_name(isa) not in present]
    assert not missing, f"no library for {', '.join(missing)} in {build.PACKAGE_LIBRARY_DIR}: {sorted(present)}"
    build.find_compiler = lambda: None  # type: ignore[assignment]
    assert library.loaded_isa() in build.levels_of_machine(), "no library was loaded"
    x, weight = torch.randn(3, 100), torch.rand(100)
    torch.testing.assert_close(rms_norm(x, None, weight, 1e-6)[0], rms_norm_reference(x, None, weight, 1e-6)[0])
    llm = LLM(max_model_len=128, kv_cache_memory_bytes=8 << 20, disable_log_stats=True)
    [output] = llm.generate(["import os\n"], SamplingParams(max_tokens=8, temperature=0.0), use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 0
    print(f"{mini_vllm.__file__}: {library.loaded_isa()}, {len(present)} libraries, {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
