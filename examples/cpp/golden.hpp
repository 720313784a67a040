#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "artifact.hpp"
#include "decoder.hpp"

// A recorded prompt, of a bank with its adapter; the tokens that eager PyTorch went on with, and its logits [tokens, vocabulary]: after the
// prompt, and after each token but the last.
struct GoldenPrompt {
  Request request;
  std::vector<std::int64_t> tokens;
  std::vector<float> logits;
};

// Reads golden.safetensors. Throws Error(Exit::input) where the manifest lists none, or it is damaged.
std::vector<GoldenPrompt> read_golden(const Artifact& artifact);

// Runs a recorded prompt. Returns the largest error of the logits, in units of what is allowed: up to 1 is right.
double replay(Decoder& decoder, const Artifact& artifact, const GoldenPrompt& golden);
