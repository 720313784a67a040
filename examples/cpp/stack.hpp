#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "artifact.hpp"
#include "initializers.hpp"

// One adapter as a bank holds it: numbers by the name of the stack that they are a layer of.
using Layers = std::map<std::string, std::vector<float>>;

// The adapters of a bank of layout "stack", in memory that this program owns and a session reads in every run: what is written here is what
// the next run computes with. Beside each block stand A and G, [1 + slots, d, room], and B, [1 + slots, room, d]. Layer 0 is zeros, for the
// base model; slot i is layer i + 1; beside an adapter's rank are zeros up to the room.
//
// ONNX Runtime makes no copy, because each stack is read by Gather alone, at an index that is an input of the graph. A weight that MatMul
// or Gemm reads is copied as it is packed for them when a session is made, and one that only constants meet is folded away; what is
// written later is lost then, without any error.
class Stack {
 public:
  // Throws Error(Exit::input): the artifact is no such bank, or its adapters are not fp32.
  explicit Stack(const Artifact& artifact);

  // Has a session use this memory. It must outlive the session.
  void lend(Ort::SessionOptions& options) const;

  // The shape of one layer, [d, room] or [room, d]. Throws std::out_of_range: there is no such stack.
  std::vector<std::int64_t> layer_shape(const std::string& name) const;

  // Puts an adapter into a slot, and into `layers` what was there, so that a second call takes it back. Not while a run is under way.
  // `layers` has all the stacks and their sizes, as read_adapter makes them.
  void exchange(std::int64_t slot, Layers& layers);

 private:
  std::map<std::string, Initializer> stacks_;
  std::map<std::string, Ort::Value> tensors_;  // over their numbers
};

// The name of a matrix, "A", "G" or "B", of a block.
std::string stack_name(const Block& block, const std::string& matrix);

// The matrices of a block's adapters.
std::vector<std::string> matrices(const Block& block);
