#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace megalodon::ops {

// The registered operator of this name, to be called through the dispatcher; F is its signature. Keep it in a
// function's static variable: finding it takes a lock.
template <class F>
auto registered(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace megalodon::ops
