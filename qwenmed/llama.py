"""A GGUF file loaded into llama.cpp, through llama-cpp-python.

Where llama.cpp was compiled for AMX (Intel's server CPUs since Sapphire Rapids), its kernels for 8-bit weights end the
whole process with SIGILL if the compiler was GCC 12: the tiles' shape is optimised away before it is loaded
(https://github.com/ggml-org/llama.cpp/pull/26954). A build can't be told from one that works, so AMX is not used.
"""

from pathlib import Path
from typing import Any

from llama_cpp import Llama, llama_model_params, llama_print_system_info


class PlainLlama(Llama):
    """Llama with the weights as they lie in the file, not repacked for AMX."""

    @property
    def model_params(self) -> llama_model_params:
        """How llama.cpp loads the file; the constructor of `Llama` sets them."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_model_params) -> None:
        # The constructor takes no such argument, but sets its parameters here before it loads the file.
        params.use_extra_bufts = False
        self._model_params = params


def load(path: Path | str, **settings: Any) -> Llama:
    """The file, loaded without the lines that llama.cpp prints about it.

    Args:
        path: of the GGUF file.
        settings: of `llama_cpp.Llama`.

    Raises:
        ValueError: llama.cpp can't read the file. The binding raises others where a file is damaged.
    """
    kind = PlainLlama if b"AMX_INT8 = 1" in llama_print_system_info() else Llama
    return kind(str(path), verbose=False, **settings)
