#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <string>

namespace megalodon::ops {

// The device that `wanted` names: "cpu"; "cuda", a request error where there is none; "auto" or "": CUDA
// where there is a GPU and the plugin, else the CPU. All CUDA code is in that plugin, libmegalodon_cuda.so
// beside the program or in the lib folder beside its own; it is loaded when CUDA is first asked for, which
// must come before anything asks torch about CUDA.
at::Device open_device(const std::string& wanted);

// From here on two runs on one GPU give the same bits; for that torch's own kernels take slower ways where
// they must, and cuBLASLt's algorithms are its own guess. The project's kernels sum in an order that depends
// on the shapes alone in any case. To be called before the device is first used.
void make_deterministic();

// From here on the sizes of tensors may keep changing and growing: what a GPU's memory held of earlier sizes
// is joined for later ones, instead of waiting for the same again. To be called before a device is opened.
void expect_changing_sizes();

// Waits for the work that `device` was given.
void synchronize(at::Device device);

// Most memory that tensors on a CUDA device have taken since the process started, in bytes.
int64_t peak_device_bytes(at::Device device);

// Whether the operators have kernels for CUDA tensors: the plugin is loaded.
bool has_cuda_kernels();

}  // namespace megalodon::ops
