"""Megalodon (arXiv 2404.08801) in plain PyTorch: the peer that the C++ program is measured against.

Shapes: B batch, L length, D model, N CEMA components, G norm groups, H heads, Z query/key, E value, F feed-forward,
c chunk. Statistics, CEMA and the softmax are float32 at least; under autocast the matrix products are bfloat16.
"""

from dataclasses import dataclass
import math

import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class MegalodonConfig:
    vocabulary: int = 256
    layers: int = 6
    D: int = 384
    H: int = 3
    Z: int = 192
    E: int = 384
    F: int = 1024
    N: int = 8
    G: int = 32
    chunk: int = 512
    swiglu: bool = True
    layer_scale: bool = False
    tied: bool = False
    scaled_embedding: bool = False
    rope_base: float = 1e4
    eps: float = 1e-5


class FftConvolution(torch.autograd.Function):
    """Causal convolution of u [B, D, L] with k [D, L]. Own backward: autograd's runs complex FFTs where real ones do."""

    @staticmethod
    def forward(ctx, u, k):
        L = u.shape[-1]
        size = 2 ** math.ceil(math.log2(2 * L))
        u_f, k_f = torch.fft.rfft(u, n=size), torch.fft.rfft(k, n=size)
        ctx.save_for_backward(u_f, k_f)
        ctx.size = size
        return torch.fft.irfft(u_f * k_f, n=size)[..., :L]

    @staticmethod
    def backward(ctx, dy):
        L = dy.shape[-1]
        u_f, k_f = ctx.saved_tensors
        dy_f = torch.fft.rfft(dy, n=ctx.size)
        du = torch.fft.irfft(dy_f * k_f.conj(), n=ctx.size)[..., :L]
        dk = torch.fft.irfft((dy_f * u_f.conj()).sum(0), n=ctx.size)[..., :L]
        return du, dk


class Cema(nn.Module):
    """Complex exponential moving average as one causal convolution through the FFT."""

    def __init__(self, D, N):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(D, N, 1) * 0.2)
        self.delta = nn.Parameter(torch.randn(D, N, 1) * 0.2)
        f = torch.exp(-torch.arange(1, D + 1) * math.log(D) / D)[torch.randperm(D)]
        self.theta = nn.Parameter(torch.logit(f).view(D, 1, 1))
        self.gamma = nn.Parameter(torch.stack((torch.randn(D, N), torch.zeros(D, N)), -1))
        self.omega = nn.Parameter(nn.init.trunc_normal_(torch.empty(D, 1), std=0.25, a=-1, b=1))

    def kernel(self, L):
        """k_j = Re(sum_n p_n eta_n q_n^j), [D, L]. Powers of q as q^(64 a) q^b: one small product instead of exp on [D, N, L]."""
        N = self.alpha.shape[1]
        n = torch.arange(1, N + 1, device=self.alpha.device, dtype=self.alpha.dtype)
        p = self.alpha.sigmoid().squeeze(-1)  # [D, N]
        phi = n * (2 * math.pi / N) * self.theta.sigmoid().squeeze(-1)
        log_q = torch.complex(torch.log1p(-p * self.delta.sigmoid().squeeze(-1)), phi)
        weight = torch.view_as_complex(self.gamma) * (p / math.sqrt(N))
        inner = min(64, L)
        outer = -(-L // inner)
        step = torch.arange(max(inner, outer), device=p.device, dtype=p.dtype)
        low = torch.exp(log_q[:, :, None] * step[:inner])  # [D, N, inner]
        high = torch.exp(log_q[:, None, :] * (inner * step[:outer])[:, None]) * weight[:, None, :]  # [D, outer, N]
        return (high @ low).real.flatten(1)[:, :L]

    def forward(self, x):  # [B, L, D]
        u = x.to(self.omega.dtype).transpose(1, 2).contiguous()  # [B, D, L]
        y = FftConvolution.apply(u, self.kernel(x.shape[1]))
        return torch.addcmul(y, u, self.omega).transpose(1, 2).contiguous()


class TimestepNorm(nn.Module):
    """Group normalization over the features of all steps so far."""

    def __init__(self, D, G, eps):
        super().__init__()
        self.G, self.eps = G, eps
        self.weight = nn.Parameter(torch.zeros(D))
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x):  # [B, L, D]
        B, L, D = x.shape
        groups = x.to(self.weight.dtype).view(B, L, self.G, D // self.G)
        m = groups.mean(-1)  # [B, L, G]
        s = (groups - m[..., None]).square().mean(-1)  # var_mean takes four times as long
        count = torch.arange(1, L + 1, device=x.device, dtype=s.dtype).view(L, 1)
        mean = m.cumsum(1) / count
        before = F.pad(mean[:, :-1], (0, 0, 1, 0))
        variance = (s + (m - before).square() * ((count - 1) / count)).cumsum(1) / count
        y = (groups - mean[..., None]) * torch.rsqrt(variance + self.eps)[..., None]
        return torch.addcmul(self.bias, y.view(B, L, D), 1 + self.weight)


def rope_table(length, d, base, device, dtype):
    """e^(i position base^(-2i/d)), [length, d/2]."""
    frequency = base ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64 if dtype != torch.float64 else torch.complex128)


def rope(x, table):  # [.., L, H, d]: rotates the pairs (2i, 2i+1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None, :]).flatten(-2)


class Mega(nn.Module):
    """The normalized gated attention sub-block."""

    def __init__(self, config):
        super().__init__()
        D, Z, E = config.D, config.Z, config.E
        self.config = config
        self.timenorm = TimestepNorm(D, config.G, config.eps)
        self.cema = Cema(D, config.N)
        self.rmsnorm = Weight(D)
        self.wz, self.wv, self.wr = nn.Linear(D, Z), nn.Linear(D, E), nn.Linear(D, E)
        self.wh1, self.wh2 = nn.Linear(D, D), nn.Linear(E, D, bias=False)
        self.gamma = nn.Parameter(torch.zeros(2, Z))
        self.beta = nn.Parameter(torch.zeros(2, Z))

    def forward(self, x, table):
        c = self.config
        B, L, D = x.shape
        H, dz, dv = c.H, c.Z // c.H, c.E // c.H
        x_n = self.timenorm(x)
        with torch.autocast("cpu", enabled=False):
            mx = F.rms_norm(self.cema(x_n), (D,), 1 + self.rmsnorm.weight, c.eps)
        z = F.rms_norm(self.wz(mx).to(x.dtype).view(B, L, H, dz), (dz,), eps=c.eps)
        scale = ((1 + self.gamma) / math.sqrt(dz)).view(2, 1, H, dz)
        q, k = torch.addcmul(self.beta.view(2, 1, 1, H, dz), z, scale[:, None]).unbind(0)
        q, k = rope(q, table), rope(k, table)
        v = F.silu(self.wv(x_n)).view(B, L, H, dv)
        r = F.silu(self.wr(mx))
        o = chunk_attention(q.to(v.dtype), k.to(v.dtype), v, c.chunk)
        return x + (self.wh1(mx) + self.wh2(o.flatten(2) * r))


def chunk_attention(q, k, v, chunk):
    """Causal attention inside chunks; q, k [B, L, H, dz], v [B, L, H, dv].

    scaled_dot_product_attention has no fused kernel for dv != dz on a CPU; this form takes half its time in bfloat16.
    """
    L = q.shape[1]
    c = min(chunk, L)
    whole = L - L % c
    mask = torch.full((c, c), -math.inf, dtype=q.dtype, device=q.device).triu(1)

    def attend(q, k, v):  # [.., l, H, d]
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) + mask[: q.shape[-2], : q.shape[-2]]
        return (torch.softmax(scores, -1) @ v).transpose(-3, -2)

    o = attend(*(t[:, :whole].unflatten(1, (-1, c)) for t in (q, k, v))).flatten(1, 2)
    return o if whole == L else torch.cat((o, attend(q[:, whole:], k[:, whole:], v[:, whole:])), 1)


class Weight(nn.Module):
    """The learned part of a norm with factor 1 + weight."""

    def __init__(self, D, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))
        if bias:
            self.bias = nn.Parameter(torch.zeros(D))


class FeedForward(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.norm = Weight(config.D, bias=True)
        self.fc1 = nn.Linear(config.D, config.F, bias=False)
        self.fc2 = nn.Linear(config.F, config.D, bias=False)
        if config.swiglu:
            self.fc3 = nn.Linear(config.D, config.F, bias=False)
        if config.layer_scale:
            self.alpha = nn.Parameter(torch.full((config.D,), 0.1 * 0.5**layer))

    def forward(self, y, residual):
        u = F.layer_norm(y, (self.config.D,), 1 + self.norm.weight, self.norm.bias, self.config.eps)
        h = F.silu(self.fc1(u))
        out = self.fc2(h * self.fc3(u) if self.config.swiglu else h)
        return torch.addcmul(residual, out, self.alpha) if self.config.layer_scale else residual + out


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.mega = Mega(config)
        self.nffn = FeedForward(config, layer)

    def forward(self, x, table):
        return self.nffn(self.mega(x, table), x)


class Output(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.final_norm = TimestepNorm(config.D, config.G, config.eps)
        if not config.tied:
            self.output = nn.Linear(config.D, config.vocabulary, bias=False)


class Megalodon(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.D)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.output = Output(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(1 / (3 * module.in_features)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        std = 1 / math.sqrt(config.D)
        for weight in [self.embed.weight] + ([] if config.tied else [self.output.output.weight]):
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, tokens):  # [B, L] -> logits [B, L, vocabulary]
        c = self.config
        x = self.embed(tokens)
        if c.scaled_embedding:
            x = x * math.sqrt(c.D)
        table = rope_table(c.chunk, c.Z // c.H, c.rope_base, tokens.device, x.dtype)
        table = table.repeat(-(-tokens.shape[1] // c.chunk), 1)[: tokens.shape[1]]
        for block in self.layers:
            x = block(x, table)
        x = self.output.final_norm(x)
        weight = self.embed.weight if c.tied else self.output.output.weight
        return F.linear(x, weight)
