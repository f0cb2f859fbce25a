"""Times Hugging Face transformers' Llama without positions (NoPE): full training steps and batched greedy generation.

Prints one JSON line a case: each task in every form that may be its fastest. A step is forward, backward, clipping and
fused AdamW; generation is `generate` with a cache, greedy, nothing ending early. bfloat16 is autocast over float32
weights, or the whole model (and in training its optimizer) in bfloat16: less exact than what it is compared with.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

VOCABULARY = 102
PARAMETERS = 14_239_104

# No positions: rotation would be by an angle of 0, so it is left out, which is faster still.
modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, unsqueeze_dim=1: (q, k)


def make_model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    return model.to(torch.bfloat16) if dtype == "bfloat16" else model


class Training:
    def __init__(self, dtype, compiled, args):
        self.model = make_model(dtype).train()
        self.autocast = dtype == "autocast"
        self.forward = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-12, fused=True)
        self.tokens = torch.randint(VOCABULARY, (args.batch, args.length + 1))

    def __call__(self):
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.forward(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Generation:
    def __init__(self, dtype, compiled, args):
        self.model = make_model(dtype).eval()
        self.autocast = dtype == "autocast"
        self.more = {"cache_implementation": "static"} if compiled else {}
        if compiled:
            self.model.forward = torch.compile(self.model.forward)
        self.tokens = torch.randint(VOCABULARY, (args.sequences, args.prompt))
        self.new = args.new

    @torch.inference_mode()
    def __call__(self):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            answers = self.model.generate(
                self.tokens,
                attention_mask=torch.ones_like(self.tokens),
                max_new_tokens=self.new,
                do_sample=False,
                use_cache=True,
                **self.more,
            )
        assert answers.shape[1] == self.tokens.shape[1] + self.new


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(task, dtype, compiled, args):
    call = (Training if task == "train" else Generation)(dtype, compiled, args)
    for _ in range(args.warmup):
        call()
    seconds = [timed(call) for _ in range(args.steps)]
    median = statistics.median(seconds)
    shape = {"batch": args.batch, "length": args.length}
    if task == "generate":
        shape = {"sequences": args.sequences, "prompt": args.prompt, "new": args.new}
    result = {"benchmark": task, "peer": "transformers", "dtype": dtype, "compiled": compiled, **shape}
    result |= {"seconds": round(median, 4), "seconds_min": round(min(seconds), 4), "seconds_max": round(max(seconds), 4)}
    return result | {
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("train", "generate"), action="append", help="default: both")
    parser.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), action="append", help="default: all")
    parser.add_argument("--form", choices=("eager", "compiled"), action="append", help="default: both")
    parser.add_argument("--batch", type=int, default=64, help="training: sequences")
    parser.add_argument("--length", type=int, default=56, help="training: tokens a sequence")
    parser.add_argument("--sequences", type=int, default=256, help="generation: prompts at once")
    parser.add_argument("--prompt", type=int, default=36, help="generation: tokens of a prompt")
    parser.add_argument("--new", type=int, default=18, help="generation: tokens of an answer")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    for task in args.task or ("train", "generate"):
        for form in args.form or ("eager", "compiled"):
            for dtype in args.dtype or ("float32", "autocast", "bfloat16"):
                try:
                    print(json.dumps(measure(task, dtype, form == "compiled", args)), flush=True)
                except RuntimeError as error:  # a form that this version cannot run is no form of the peer
                    print(f"{task} {form} {dtype}: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
