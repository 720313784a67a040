#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "artifact.hpp"

// An artifact in ONNX Runtime on the CPU, decoding one sequence of tokens with a cache of keys and values.
//
// A graph with GroupQueryAttention appends to its cache in place: each cache is one buffer of `capacity` tokens, bound as past input and as
// present output alike, and the attention mask tells how many of its tokens count. Any other graph returns a cache that is longer by the
// new tokens, which becomes the past of the next run.
class Decoder {
 public:
  // `threads` is how many one operator may use; 0 leaves it to ONNX Runtime. Throws Ort::Exception where the model cannot be loaded.
  Decoder(const Artifact& artifact, int threads);

  // Begins a sequence that can have up to `capacity` tokens, the prompt included. Returns the logits [vocabulary] after the prompt.
  std::vector<float> start(std::span<const std::int64_t> prompt, std::size_t capacity);

  // Appends one token. Returns the logits [vocabulary] after it.
  std::vector<float> step(std::int64_t token);

 private:
  struct Cache {
    std::string past, present;          // the names of the input and of the output
    std::vector<std::int64_t> shape;    // [1, heads, 0, head size]
    ONNXTensorElementDataType type;
    Ort::Value value{nullptr};
  };

  std::vector<float> run(std::span<const std::int64_t> tokens);
  Ort::Value tensor(std::span<const std::int64_t> numbers) const;

  Ort::Env env_;
  Ort::Session session_;
  Ort::MemoryInfo memory_;
  bool shared_;
  bool positions_wanted_ = false;
  std::vector<Cache> caches_;
  std::vector<std::int64_t> ones_, positions_;  // attention mask and positions of a whole sequence; a run sees a part of them
  std::size_t length_ = 0;                      // tokens in the cache
};

// What was decoded, and how long it took: to the first token, and for each token after it, in seconds.
struct Answer {
  std::vector<std::int64_t> tokens;
  double time_to_first_token, time_per_output_token;
};

// The most likely continuation, token by token: up to `count` tokens, or up to one that ends an answer, which is left out.
// Throws Error(Exit::input) where the prompt is empty, holds no tokens of the model, or leaves no room in its context.
Answer decode_greedily(Decoder& decoder, const Artifact& artifact, std::span<const std::int64_t> prompt, std::size_t count);
