#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "artifact.hpp"

// A weight of a graph: its shape, and its numbers in C order.
struct Initializer {
  std::vector<std::int64_t> shape;
  std::vector<float> numbers;
};

// Reads weights of model.onnx by name, from model.onnx.data. ONNX Runtime takes weights, but gives none out.
// Throws Error(Exit::input): one is not there or not fp32, or model.onnx is damaged.
std::map<std::string, Initializer> read_initializers(const Artifact& artifact, const std::vector<std::string>& names);
