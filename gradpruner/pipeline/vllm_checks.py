"""What is refused of a run whose answers vLLM generates, from its config and data, before any weight is loaded.

`Setup.resolved_evaluation` has found vLLM by then.
"""

from gradpruner import processes
from gradpruner.checkpoints.checkpoint import SHAPE_FILE
from gradpruner.evaluate.generate import VLLM, Generation
from gradpruner.evaluate.vllm_engine import check_stock_shape
from gradpruner.models.shape import config_shape, shaped_config
from gradpruner.pipeline.setup import Setup


def uses_vllm(setup: Setup) -> bool:
    """Returns whether vLLM generates the answers of a run."""
    return isinstance(setup.evaluation, Generation) and setup.evaluation.engine == VLLM


def check_vllm(setup: Setup) -> None:
    """Refuses a model or a setting that vLLM cannot do with, if it generates the answers.

    Raises:
        ValueError: if there are several processes, if layers differ in width, if the adapter is kept apart, or if
            answers do not fit into the model's positions.
    """
    evaluation = setup.resolved_evaluation
    if not (isinstance(evaluation, Generation) and uses_vllm(setup)):
        return
    if processes.count() > 1:
        raise ValueError(
            f"One process starts vLLM and asks it all questions, got {processes.count()} processes from torchrun or "
            "accelerate. Run again with plain python, which finds the finished stages in cache_dir, or set "
            "evaluation.engine=transformers."
        )
    if getattr(setup.method, "widths_depend_on_data", False):
        raise ValueError(
            f"vLLM builds a model from config.json alone and reads no {SHAPE_FILE}, got method={setup.method.name}, "
            "whose layers differ in width. Set evaluation.engine=transformers, or choose a method that prunes whole "
            "layers."
        )
    check_stock_shape(setup.shape, config_shape(shaped_config(setup.config, setup.shape)))
    if setup.training.mode == "lora" and not setup.training.merge_adapter:
        raise ValueError(
            "evaluation.engine=vllm generates with the merged checkpoint, got finetune.merge_adapter=false. Set "
            "finetune.merge_adapter=true or evaluation.engine=transformers."
        )
    assert evaluation.max_new_tokens is not None
    limit = getattr(setup.config, "max_position_embeddings", None)
    longest = max(len(question.prompt) for question in setup.questions)
    if limit is not None and longest + evaluation.max_new_tokens > limit:
        raise ValueError(
            f"vLLM needs a prompt and its answer within the {limit} positions that {setup.base_model.name} was made "
            f"for, got a prompt of {longest} tokens and evaluation.max_new_tokens={evaluation.max_new_tokens}. Lower "
            "evaluation.max_new_tokens or dataset.max_length."
        )
