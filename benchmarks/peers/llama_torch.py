"""A Llama-style decoder in plain PyTorch: RMSNorm, SwiGLU, RoPE, grouped queries, fused attention."""

from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class LlamaConfig:
    vocabulary: int = 256
    layers: int = 6
    D: int = 384
    heads: int = 6
    kv_heads: int = 6
    F: int = 1104
    rope_base: float = 1e4
    eps: float = 1e-5


def rope_tables(length, d, base, device):
    """cos and sin, [length, d], each angle twice: the halves of a head rotate against each other."""
    frequency = base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    angle = (torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def rope(x, cos, sin):  # [B, H, L, d]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, d = config.D, config.D // config.heads
        self.config = config
        self.attention_norm = nn.RMSNorm(D, eps=config.eps)
        self.wq = nn.Linear(D, config.heads * d, bias=False)
        self.wk = nn.Linear(D, config.kv_heads * d, bias=False)
        self.wv = nn.Linear(D, config.kv_heads * d, bias=False)
        self.wo = nn.Linear(config.heads * d, D, bias=False)
        self.ffn_norm = nn.RMSNorm(D, eps=config.eps)
        self.w1 = nn.Linear(D, config.F, bias=False)
        self.w2 = nn.Linear(config.F, D, bias=False)
        self.w3 = nn.Linear(D, config.F, bias=False)

    def forward(self, x, cos, sin):
        c, d = self.config, self.config.D // self.config.heads
        u = self.attention_norm(x)
        q, k, v = (w(u).unflatten(-1, (-1, d)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.kv_heads != c.heads)
        x = x + self.wo(o.transpose(1, 2).flatten(2))
        u = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(u)) * self.w3(u))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.D)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.D, eps=config.eps)
        self.output = nn.Linear(config.D, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.layers:  # the branches that add to the residual, as GPT-2 does
            for weight in (block.wo.weight, block.w2.weight):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens):  # [B, L] -> logits [B, L, vocabulary]
        c = self.config
        x = self.embed(tokens)
        cos, sin = rope_tables(tokens.shape[1], c.D // c.heads, c.rope_base, tokens.device)
        if torch.is_autocast_enabled("cpu"):
            cos, sin = cos.to(torch.get_autocast_dtype("cpu")), sin.to(torch.get_autocast_dtype("cpu"))
        for block in self.layers:
            x = block(x, cos, sin)
        return self.output(self.norm(x))
