#include "stack.hpp"

#include <algorithm>
#include <span>

#include "error.hpp"

std::string stack_name(const Block& block, const std::string& matrix) { return block.name + ".ffba_" + matrix + ".weight_t"; }

std::vector<std::string> matrices(const Block& block) {
  return block.activation == "gated" ? std::vector<std::string>{"G", "A", "B"} : std::vector<std::string>{"A", "B"};
}

Stack::Stack(const Artifact& artifact) {
  if (!artifact.bank || artifact.bank->layout != "stack") {
    throw Error(Exit::input, "adapters can be swapped in a bank of layout \"stack\" alone: build one with --bank stack");
  }
  const Bank& bank = *artifact.bank;
  std::vector<std::string> names;
  for (const Block& block : bank.blocks) {
    for (const std::string& matrix : matrices(block)) names.push_back(stack_name(block, matrix));
  }
  stacks_ = read_initializers(artifact, names);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  for (auto& [name, stack] : stacks_) {
    if (stack.shape.size() != 3 || stack.shape[0] != std::ssize(bank.names) + 1) {
      throw Error(Exit::input, name + " is no stack of " + std::to_string(bank.names.size()) + " adapters. Build the artifact again.");
    }
    tensors_.emplace(name, Ort::Value::CreateTensor<float>(memory, stack.numbers.data(), stack.numbers.size(), stack.shape.data(), 3));
  }
}

void Stack::lend(Ort::SessionOptions& options) const {
  for (const auto& [name, tensor] : tensors_) options.AddInitializer(name.c_str(), tensor);
}

std::vector<std::int64_t> Stack::layer_shape(const std::string& name) const {
  const std::vector<std::int64_t>& shape = stacks_.at(name).shape;
  return {shape[1], shape[2]};
}

void Stack::exchange(std::int64_t slot, Layers& layers) {
  for (auto& [name, stack] : stacks_) {
    std::vector<float>& layer = layers.at(name);
    std::ranges::swap_ranges(layer, std::span(stack.numbers).subspan(static_cast<std::size_t>(slot + 1) * layer.size(), layer.size()));
  }
}
