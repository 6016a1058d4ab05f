"""Formats that plain weights are brought into while they load: `--quantization` and its options.

`QuantizationOptions` says what a user asked for; `OnLoadQuantization` answers each layer from it and remembers the
answers, so that the log can say which kernel every kind of layer got, and so that a pattern that matched nothing is an
error. How a layer stores and multiplies is in `int8.py` and `int4.py`.
"""

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from mini_vllm.config import QuantizationOptions
from mini_vllm.exceptions import ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.ops.cpu import linear as kernels
from mini_vllm.platforms import current_platform
from mini_vllm.quantization.base import QuantizationConfig, QuantizeMethodBase
from mini_vllm.quantization.int4 import Int4LinearMethod, int4_format
from mini_vllm.quantization.int8 import Int8LinearMethod, int8_format
from mini_vllm.quantization.packed import PackedLinearMethod

logger = init_logger(__name__)

LM_HEAD = "lm_head"


class OnLoadQuantization(QuantizationConfig):
    """Quantises linear layers, and the head as the options say; look-up tables and norms stay as they are.

    Raises `ConfigError` where there are no kernels for the device.
    """

    def __init__(self, options: QuantizationOptions) -> None:
        if current_platform.device_type != "cpu":
            raise ConfigError(
                f"quantization: {options.method!r} has kernels for CPUs only, and the device is "
                f"{current_platform.device_type!r}"
            )
        self.options = options
        self._unmatched = set(options.skip_layers)
        self._layers: dict[str, Counter[str]] = {}

    def get_name(self) -> str:
        return self.options.method

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        kind = prefix.rpartition(".")[2]
        if kind != LM_HEAD and not hasattr(layer, "input_size_per_partition"):
            return None  # a look-up table
        method = None if self._is_skipped(prefix) else self._method_for(kind)
        counts = self._layers.setdefault(kind, Counter())
        counts["not quantised" if method is None else method.describe()] += 1
        return method

    def _method_for(self, kind: str) -> PackedLinearMethod | None:
        options = self.options
        weights = "int4" if options.method == "int4" else "int8"
        if kind == LM_HEAD and options.lm_head != "same":
            weights = options.lm_head
        if weights == "none":
            return None
        if weights == "int4":
            return Int4LinearMethod(int4_format(options))
        return Int8LinearMethod(int8_format(options))

    def _is_skipped(self, prefix: str) -> bool:
        parts = prefix.split(".")
        hits = {p for p in self.options.skip_layers if fnmatchcase(prefix, p) or p in parts or f"{p}." in f"{prefix}."}
        self._unmatched -= hits
        return bool(hits)

    def check_complete(self) -> None:
        """Called when all layers exist: logs what each kind got; a pattern that matched none is a `ConfigError`."""
        if self._unmatched:
            raise ConfigError(
                f"quantization_skip_layers: {', '.join(sorted(self._unmatched))} matches no layer; there are "
                f"{', '.join(sorted(self._layers))} (q, k, v and gate, up are one layer each)"
            )
        for kind, counts in self._layers.items():
            for what, count in counts.items():
                logger.info("Quantization of %s (%d): %s", kind, count, what)
        if not kernels.available():
            logger.warning("quantization: no native kernels here, so torch dequantises weights in every call: slow")
