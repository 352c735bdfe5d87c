"""Fine-tune a pruned model with TRL's SFTTrainer.

    pip install trl
    python examples/continue_with_trl.py pruned pruned-tuned

The first argument is what compress_in_memory.py saved, the second one the folder to write.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source)

# With prompt and completion, the loss is on the completion alone.
rows = [{"prompt": f"What is {a} plus {b}?\nAnswer:", "completion": f" {a + b}"} for a in range(10) for b in range(10)]

trainer = SFTTrainer(
    model,
    SFTConfig(output_dir=target, num_train_epochs=1, per_device_train_batch_size=10, learning_rate=1e-4, max_length=64,
              bf16=torch.cuda.is_available(), logging_steps=5, save_strategy="no", report_to="none"),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
trainer.save_model(target)
