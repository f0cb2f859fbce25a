"""Compares megalodon_torch.py with the model files of the golden tests: logits, loss and every gradient.

usage: check_golden.py FILE.safetensors...
"""

import json
import struct
import sys

import torch
import torch.nn.functional as F

from megalodon_torch import Megalodon, MegalodonConfig

DTYPES = {"F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
TOLERANCE = {torch.float64: (3e-6, 5e-6), torch.float32: (3e-6, 1e-5)}  # logits, gradients: ||a - b|| / ||b||


def read_safetensors(path):
    data = bytearray(open(path, "rb").read())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        tensors[name] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, metadata


def config_of(m):
    return MegalodonConfig(
        vocabulary=int(m["vocab_size"]),
        layers=int(m["num_layers"]),
        D=int(m["model_dim"]),
        H=int(m["num_heads"]),
        Z=int(m["z_dim"]),
        E=int(m["value_dim"]),
        F=int(m["ffn_hidden_dim"]),
        N=int(m["cema_ndim"]),
        G=int(m["norm_num_groups"]),
        chunk=int(m["chunk_size"]),
        swiglu=m["swiglu"] == "True",
        layer_scale=m["rescale_nffn"] == "True",
        tied=m["share_emb"] == "True",
        scaled_embedding=m["scale_emb"] == "True",
        rope_base=float(m.get("rope_base", 1e4)),
        eps=float(m["norm_eps"]),
    )


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def check(path, dtype):
    tensors, metadata = read_safetensors(path)
    model = Megalodon(config_of(metadata)).to(dtype)
    model.load_state_dict({k[6:]: v.to(dtype) for k, v in tensors.items() if k.startswith("param.")})
    logits = model(tensors["tokens"].long())
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["targets"].long().flatten())
    loss.backward()
    logit_error = max(distance(logits, tensors["logits"]), distance(loss, tensors["loss"][0]))
    errors = {n: distance(p.grad, tensors["grad." + n]) for n, p in model.named_parameters()}
    worst = max(errors, key=errors.get)
    print(f"{path} {dtype}: logits {logit_error:.1e}, gradients {errors[worst]:.1e} ({worst})")
    return logit_error <= TOLERANCE[dtype][0] and errors[worst] <= TOLERANCE[dtype][1]


def main(paths):
    if not paths:
        sys.exit(__doc__)
    ok = [check(path, dtype) for path in paths for dtype in (torch.float64, torch.float32)]
    sys.exit(0 if all(ok) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
