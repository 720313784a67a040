#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "artifact.hpp"

class Stack;

// A row of a batch: a prompt and, of a bank, the slot of the adapter that answers it.
struct Request {
  std::vector<std::int64_t> prompt;
  std::int64_t adapter = base_model;
};

using Logits = std::vector<std::vector<float>>;  // [batch, vocabulary]

// An artifact in ONNX Runtime on the CPU, decoding a batch of prompts with a cache of keys and values.
//
// A graph with GroupQueryAttention appends to its cache in place: each cache is one buffer of `capacity` tokens a row, bound as past input
// and as present output alike, and the attention mask tells how many of them count. Its rows are padded on the right. Any other graph
// returns a cache that is longer by the new tokens, which becomes the past of the next run; its rows are padded on the left.
class Decoder {
 public:
  static constexpr std::int64_t ended = -1;  // in place of a token

  // `threads` is how many one operator may use; 0 leaves it to ONNX Runtime. `stack` is memory that the session shall read a bank's
  // adapters from; it must outlive the decoder. Throws Ort::Exception where the model cannot be loaded.
  Decoder(const Artifact& artifact, int threads, const Stack* stack = nullptr);

  // Begins a batch whose rows can have up to `capacity` tokens, the prompt included. Returns the logits after each prompt.
  Logits start(std::span<const Request> batch, std::size_t capacity);

  // Appends one token to each row, but none where it is `ended`. Returns the logits after it; those of rows that have ended mean nothing.
  Logits step(std::span<const std::int64_t> tokens);

 private:
  struct Cache {
    std::string past, present;          // the names of the input and of the output
    std::vector<std::int64_t> shape;    // [batch, heads, 0, head size]
    ONNXTensorElementDataType type;
    Ort::Value value{nullptr};
  };

  Logits run(std::span<const std::int64_t> ids, std::span<const std::int64_t> positions, std::span<const std::size_t> last);
  Ort::Value tensor(std::span<const std::int64_t> numbers) const;

  Ort::Env env_;
  Ort::Session session_;
  Ort::MemoryInfo memory_;
  bool shared_;
  bool positions_wanted_ = false, adapters_wanted_ = false;
  std::vector<Cache> caches_;
  std::size_t capacity_ = 0;
  std::vector<std::int64_t> lengths_, adapters_;  // of each row
  std::vector<std::vector<std::int64_t>> masks_;  // of each row; what it lacks of the longest is 0
};

// What was decoded of each row, and how long it took: to the first tokens, and for each step after them, in seconds.
struct Answer {
  std::vector<std::vector<std::int64_t>> tokens;
  double time_to_first_token, time_per_output_token;
};

// The most likely continuation of each row, token by token: up to `count` tokens, or up to one that ends an answer, which is left out.
// Throws Error(Exit::input) where a prompt is empty, holds no tokens of the model, or leaves no room in its context.
Answer decode_greedily(Decoder& decoder, const Artifact& artifact, std::span<const Request> batch, std::size_t count);
