"""Show one rendered training example, and which of its tokens have a loss."""

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from gradpruner.pipeline.run import Pipeline


def show_example(pipeline: Pipeline, console: Console | None = None) -> None:
    """Prints the first training example as the model sees it: the prompt dim, each token with loss bold in brackets."""
    row, tokenizer = pipeline.rows[0], pipeline.tokenizer
    num_prompt = len(row.input_ids) - row.num_answer_tokens
    text = Text(tokenizer.decode(row.input_ids[:num_prompt]), style="dim")
    without_loss = {index for start, end in row.gaps for index in range(start, end)}
    for index, token in enumerate(row.input_ids[num_prompt:], start=num_prompt):
        if index in without_loss:
            text.append(tokenizer.decode([token]), style="dim")
            continue
        text.append("[", style="green").append(tokenizer.decode([token]), style="bold").append("]", style="green")
    num_loss = row.num_answer_tokens - len(without_loss)
    counts = f"{len(pipeline.train_examples)} train, {len(pipeline.test_examples)} test rows"
    (console or Console(stderr=True)).print(
        Panel(
            text,
            title=f"{pipeline.task.name}: first of {counts}",
            subtitle=f"{len(row.input_ids) - num_loss} prompt tokens, {num_loss} \\[tokens] with loss",
        )
    )
