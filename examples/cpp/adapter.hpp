#pragma once

#include <filesystem>

#include "artifact.hpp"
#include "stack.hpp"

// Reads an FFBA adapter as PEFT writes it, an adapter_model.safetensors with its adapter_config.json beside it, for any slot of a bank:
// A and G transposed to [d, r], B to [r, d] and times its scale, zeros beside the rank and for blocks without a branch.
//
// Throws Error(Exit::input) where anything is not as it must be: another method, activation, model or dtype than the bank's, a rank that
// the bank has no room for, missing or unknown tensors, numbers that are not finite. Not read here are a `rank_pattern` and selections by
// regular expression: build a bank with such an adapter in Python.
Layers read_adapter(const std::filesystem::path& file, const Artifact& artifact, const Stack& stack);
