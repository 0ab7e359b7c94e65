"""Settings of the critic, a part of wire.settings."""

import dataclasses

from wire.knob import QUANTIZATIONS, knob


@dataclasses.dataclass(frozen=True)
class CriticSettings:
    """The model that judges answers, in an engine of its own. What is not here it has in common
    with the first engine."""

    critic_model: str = knob(
        "",
        "Checkpoint folder of VisualPRM, or its name on the model hub, such as "
        "OpenGVLab/VisualPRM-8B, for 'best_of' with the critic 'visualprm'; default: none.",
    )
    critic_revision: str = knob(
        "", "Branch, tag or commit of a critic of the hub; default: the newest."
    )
    critic_device: str = knob("auto", "Where the critic runs.", choices=("auto", "cpu", "cuda"))
    critic_quantization: str = knob(
        "none",
        "The critic's weights and activations, as the setting quantization.",
        choices=QUANTIZATIONS,
    )
    critic_max_model_len: int = knob(
        0,
        "Most tokens of a question with its pictures and an answer to it, as the critic counts "
        "them; 0: its own limit.",
        low=0,
    )
    critic_kv_cache_memory: int = knob(
        0, "Bytes for the critic's KV cache; 0: measured from what is free.", low=0
    )
    critic_gpu_memory_utilization: float = knob(
        0.9,
        "Share of the GPU's memory that may be in use when the critic has taken its own, the "
        "first engine's part included: that one's gpu_memory_utilization has to be less.",
        low=0.05,
        high=1.0,
    )
    critic_cpu_memory_utilization: float = knob(
        0.5,
        "Share of the main memory that the first engine has left, which a critic on the CPU may "
        "use.",
        low=0.05,
        high=1.0,
    )
    critic_system_prompt: str = knob(
        "auto",
        "System sentence for the critic: 'auto' (the one that it was trained with), 'checkpoint' "
        "(that of its folder's template), 'none', or a text.",
    )
    critic_max_steps: int = knob(
        12,
        "Steps that an answer is judged in at most; of more, neighbours are joined.",
        low=1,
        high=256,
    )
