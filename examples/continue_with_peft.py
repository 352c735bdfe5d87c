"""Train a LoRA adapter on a pruned model with peft and the Trainer of transformers, then merge it.

    python examples/continue_with_peft.py pruned pruned-tuned

The first argument is what compress_in_memory.py saved, the second one the folder to write.
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(source)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

rows = [{"prompt": f"What is {a} plus {b}?\nAnswer:", "answer": f" {a + b}"} for a in range(10) for b in range(10)]


def encode(row):
    """Returns the tokens of a row; a label of -100 takes the prompt out of the loss."""
    prompt = tokenizer(row["prompt"]).input_ids
    answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


trainer = Trainer(
    model,
    TrainingArguments(output_dir=target, num_train_epochs=1, per_device_train_batch_size=10, learning_rate=1e-3,
                      logging_steps=5, save_strategy="no", report_to="none"),
    train_dataset=[encode(row) for row in rows],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)  # fmt: skip
trainer.train()

trainer.model.merge_and_unload().save_pretrained(target)
tokenizer.save_pretrained(target)
