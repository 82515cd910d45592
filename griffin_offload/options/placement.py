"""Where a model runs."""

from dataclasses import dataclass

from .declare import option, whole
from .group import Checked


@dataclass(frozen=True)
class Placement(Checked):
    """Where a model runs, and in how much memory. Sizes are bytes, or text such as '4GiB'."""

    device: str | None = option(
        None,
        "cuda, mps or cpu; or several GPUs as cuda:0,cuda:1, or all of them: a model that answers prompts then has on "
        "the next one the layers that the first has no room for.",
        metavar="NAME",
        default="$GRIFFIN_DEVICE, or the best there is",
    )
    device_memory: int | str | None = option(
        None,
        "The most memory to use: 4GiB, 4900MB or bytes. Of several GPUs: on each.",
        metavar="SIZE",
        default="what is free, less a margin",
    )
    dtype: str | None = option(
        None, "Precision of the weights.", choices=("float32", "bfloat16", "float16"), default="the checkpoint's"
    )
    host_memory: int | str | None = option(
        None,
        "RAM that keeps layers between prompts, so that the next prompt need not read them from disk; 0 for none. "
        "On the CPU it is part of --device-memory. Workers of generate --input share it, beside their memory; by "
        "default what they leave free.",
        metavar="SIZE",
        default="on a GPU what is free, less a margin; on the CPU none",
    )
    context: int | None = whole(
        None,
        "The most tokens of a prompt with its answer, or of a whole conversation: bounds the KV cache, and with it the "
        "memory of a run. A longer prompt is refused.",
        low=2,
        allowed="2 or more",
        default="as many as the model reads",
    )
    threads: int | None = whole(
        None,
        "Threads of the processor, however busy it is.",
        low=1,
        allowed="1 or more",
        default="torch's; while other programs use cores, as many fewer",
    )
