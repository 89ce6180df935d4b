"""The ``deepspeed:`` section of a run, checked without importing DeepSpeed.

The section is DeepSpeed's own JSON schema and is passed through. Added is the short form ``zero_stage``; the keys that
the product owns are computed from the run, and a value that contradicts it is a fault, never silently replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amlora_dist.config.schema import did_you_mean, shown
from amlora_dist.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_STAGE = 2

KNOWN_KEYS = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type
    compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather disable_python_gc dump_state eigenvalue elasticity flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    load_universal log_level memory_breakdown nebula optimizer pipeline prescale_gradients
    progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type sparse_attention
    sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization zero_stage""".split()
)
"""Top-level keys of DeepSpeed 0.18 and 0.19. Others pass too (a newer DeepSpeed) unless they look like a slip."""

KNOWN_ZERO_KEYS = frozenset(
    """allgather_bucket_size allgather_partitions allgather_sequential contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    mics_hierarchical_params_gather mics_shard_size model_persistence_threshold module_granularity_threshold
    offload_optimizer offload_param overlap_comm override_module_apply param_persistence_threshold
    pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
    stage stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
    sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights
    zero_quantized_weights""".split()
)


def zero_stage(section: Mapping[str, Any]) -> int:
    """ZeRO stage (0 to 3) that a checked section asks for; 2 where it says nothing."""
    zero = section.get("zero_optimization", {})
    return int(section.get("zero_stage", zero.get("stage", DEFAULT_STAGE)))


def expand(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with ``zero_stage: n`` written out as ``zero_optimization.stage``; a wrong one is left as it is."""
    zero, stage = section.get("zero_optimization", {}), section.get("zero_stage")
    if not isinstance(zero, dict) or not _is_stage(stage) or zero.get("stage", stage) != stage:
        return dict(section)
    rest = {key: value for key, value in section.items() if key != "zero_stage"}
    return {**rest, "zero_optimization": {**zero, "stage": stage}}


def section_faults(
    section: Mapping[str, Any], *, batch: tuple[int, int, int] | None, clip: float | None, dtype: str | None
) -> Iterator[tuple[tuple[str, ...], Fault]]:
    """Faults of an expanded section, each with the path of its key inside the section.

    What the run gives is None where the run's own value is wrong: then nothing is compared with it.

    Args:
        section: as ``expand`` returns it.
        batch: examples per optimizer step over all ranks; examples per forward pass of one rank; forward passes per
            step.
        clip: largest norm of the gradient.
        dtype: ``auto``, ``fp32`` or ``bf16``.
    """
    yield from _stage_faults(section)
    yield from _slips((), section, KNOWN_KEYS)
    zero = section.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _slips(("zero_optimization",), zero, KNOWN_ZERO_KEYS)
    owned: dict[str, tuple[float | None, str]] = {
        "train_batch_size": (batch and batch[0], "training.batch_size"),
        "train_micro_batch_size_per_gpu": (batch and batch[1], "training.micro_batch_size"),
        "gradient_accumulation_steps": (batch and batch[2], "training.micro_batch_size"),
        "gradient_clipping": (clip, "training.clip"),
    }
    for key, (value, instead) in owned.items():
        given = section.get(key, "auto")
        if given != "auto" and value is not None and (given != value or isinstance(given, bool)):
            yield (key,), Fault(key, shown(given), f"{value:g}, which follows from {instead}", f"set {instead}")
    for key, instead in {
        "optimizer": "training.learning_rate, betas and weight_decay (the method brings its own optimizer)",
        "scheduler": "training.schedule and training.warmup_steps",
    }.items():
        if section.get(key, "auto") != "auto":
            yield (key,), Fault(key, shown(section[key]), "no such key here", f"set {instead}")
    for key, name in {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}.items() if dtype else ():
        yield from _precision_faults(section, key, wanted=name, dtype=str(dtype))


def _stage_faults(section: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Fault]]:
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield ("zero_optimization",), Fault("zero_optimization", shown(zero), "a section (keys with values)")
        zero = {}
    if "zero_stage" in section and "stage" in zero and zero["stage"] != section["zero_stage"]:
        found = f"{shown(section['zero_stage'])} next to zero_optimization.stage {shown(zero['stage'])}"
        yield ("zero_stage",), Fault("zero_stage", found, "one of the two, or both equal")
    for path, given in ((("zero_stage",), section), (("zero_optimization", "stage"), zero)):
        stage = given.get(path[-1], DEFAULT_STAGE)
        if not _is_stage(stage):
            yield path, Fault(".".join(path), shown(stage), "0, 1, 2 or 3")


def _is_stage(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3


def _slips(
    path: tuple[str, ...], section: Mapping[str, Any], known: frozenset[str]
) -> Iterator[tuple[tuple[str, ...], Fault]]:
    for key in section:
        hint = "" if key in known else did_you_mean(key, sorted(known))
        if hint:
            yield (*path, key), Fault(".".join((*path, key)), "an unknown key", "a key of DeepSpeed's schema", hint)


def _precision_faults(
    section: Mapping[str, Any], key: str, *, wanted: str, dtype: str
) -> Iterator[tuple[tuple[str, ...], Fault]]:
    inner = section.get(key, {})
    if inner == "auto":
        return
    if not isinstance(inner, dict):
        yield (key,), Fault(key, shown(inner), "a section (keys with values)")
        return
    enabled = inner.get("enabled", "auto")
    if enabled != "auto" and enabled is not (dtype == wanted):
        where = f"{key}.enabled"
        expected = f"{str(dtype == wanted).lower()}, which follows from dtype: {dtype}"
        yield (key, "enabled"), Fault(where, shown(enabled), expected)
