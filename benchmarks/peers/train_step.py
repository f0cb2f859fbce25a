"""Times a full training step (forward, backward, clip, AdamW) of a peer in PyTorch; prints one JSON line a case.

The figure is the median of the timed steps after the warm-up; `--profile` adds where the time goes, on stderr.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from llama_torch import Llama, LlamaConfig
from megalodon_torch import Megalodon, MegalodonConfig

MODELS = {"megalodon": lambda: Megalodon(MegalodonConfig()), "llama": lambda: Llama(LlamaConfig())}


class Trainer:
    def __init__(self, name, dtype, optimizer, batch, length):
        torch.manual_seed(0)
        self.model = MODELS[name]()
        self.autocast = dtype == "bfloat16"
        self.length = length
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, **{optimizer: True})
        self.tokens = torch.randint(256, (batch, length + 1))

    def step(self):
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def timed(self):
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def measure(name, dtype, args):
    trainer = Trainer(name, dtype, args.optimizer, args.batch, args.length)
    for _ in range(args.warmup):
        trainer.step()
    seconds = [trainer.timed() for _ in range(args.steps)]
    if args.profile:
        with torch.profiler.profile() as profile:
            trainer.step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30), file=sys.stderr)
    median = statistics.median(seconds)
    return {
        "benchmark": "train_step",
        "peer": f"{name}_torch",
        "dtype": dtype,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "batch": args.batch,
        "length": args.length,
        "seconds": round(median, 4),
        "seconds_min": round(min(seconds), 4),
        "seconds_max": round(max(seconds), 4),
        "tokens_per_second": round(args.batch * args.length / median, 1),
        "steps": args.steps,
        "optimizer": f"AdamW {args.optimizer}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    for name in args.model or sorted(MODELS):
        for dtype in args.dtype or ("float32", "bfloat16"):
            print(json.dumps(measure(name, dtype, args)), flush=True)


if __name__ == "__main__":
    main()
