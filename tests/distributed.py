"""Train a tiny model on pairs and on groups; started alone, or in two
processes with the variables that torchrun sets.

Writes its loss curves, and says whether all ranks hold equal weights (test_distributed.py).
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from qr_rlhf.model import load_reward_model, load_tokenizer
from qr_rlhf.training import PairTrainer, training_arguments


def train(folder, table, processes):
    "Train on a table; gives the trainer."
    tokenizer = load_tokenizer(folder / "backbone")
    args = training_arguments(
        folder / f"work{processes}",
        steps=20,  # two epochs
        seed=0,
        per_device_train_batch_size=16 // processes,
        learning_rate=1e-3,
        warmup_steps=0,
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_steps=1,
        disable_tqdm=True,
    )
    model = load_reward_model(folder / "backbone", tokenizer, n=10, seed=0)
    rows = load_from_disk(str(folder / table))
    trainer = PairTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def report(trainer, path):
    "Write what the test looks at."
    scale = trainer.scale.parameters() if trainer.scale else []
    parts = [*trainer.model.parameters(), *scale]
    weights = torch.cat([p.detach().flatten() for p in parts])
    everybody = trainer.accelerator.gather(weights[None])
    if trainer.is_world_process_zero():
        found = dict(
            losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
            shared=trainer.shared,
            ranks=len(everybody),
            equal=bool((everybody == everybody[0]).all()),
        )
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    for table in ("pairs", "groups"):
        report(train(folder, table, processes), folder / f"{table}{processes}.json")
