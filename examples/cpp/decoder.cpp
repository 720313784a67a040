#include "decoder.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "error.hpp"

namespace {

Ort::SessionOptions session_options(int threads) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  return options;
}

template <typename Half>
std::vector<float> widened(const Half* numbers, std::size_t count) {
  std::vector<float> wide(count);
  std::transform(numbers, numbers + count, wide.begin(), [](Half number) { return number.ToFloat(); });
  return wide;
}

// The last row of logits [1, tokens, vocabulary], as fp32. Throws Error(Exit::input) where they have another rank, or no row.
std::vector<float> last_row(const Ort::Value& logits) {
  const auto info = logits.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> shape = info.GetShape();
  if (shape.size() != 3 || shape[0] != 1 || shape[1] < 1) {
    throw Error(Exit::input, "model.onnx gives logits of rank " + std::to_string(shape.size()) +
                                 ", but they must be [1, tokens, vocabulary] with at least 1 token. Build the artifact again.");
  }
  const auto count = static_cast<std::size_t>(shape[2]);
  const std::size_t first = info.GetElementCount() - count;
  switch (info.GetElementType()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: {
      const float* numbers = logits.GetTensorData<float>() + first;
      return {numbers, numbers + count};
    }
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return widened(logits.GetTensorData<Ort::Float16_t>() + first, count);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return widened(logits.GetTensorData<Ort::BFloat16_t>() + first, count);
    default:
      throw Error(Exit::runtime, "logits are neither fp32 nor fp16 nor bf16");
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Decoder::Decoder(const Artifact& artifact, int threads)
    : env_(ORT_LOGGING_LEVEL_ERROR, "flora"),
      session_(env_, artifact.model().c_str(), session_options(threads)),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      shared_(artifact.grouped_attention) {
  const std::string past = "past_key_values.";
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
    const std::string name = session_.GetInputNameAllocated(i, allocator).get();
    positions_wanted_ |= name == "position_ids";
    if (name.rfind(past, 0) != 0) continue;
    const Ort::TypeInfo type = session_.GetInputTypeInfo(i);  // it owns what the next line looks at
    const auto info = type.GetTensorTypeAndShapeInfo();
    const auto shape = info.GetShape();  // [batch, heads, past tokens, head size]
    caches_.push_back({name, "present." + name.substr(past.size()), {1, shape.at(1), 0, shape.at(3)}, info.GetElementType()});
  }
}

std::vector<float> Decoder::start(std::span<const std::int64_t> prompt, std::size_t capacity) {
  ones_.assign(capacity, 1);
  positions_.resize(capacity);
  std::iota(positions_.begin(), positions_.end(), 0);
  length_ = 0;
  Ort::AllocatorWithDefaultOptions allocator;
  for (Cache& cache : caches_) {
    cache.shape[2] = shared_ ? static_cast<std::int64_t>(capacity) : 0;
    cache.value = Ort::Value::CreateTensor(allocator, cache.shape.data(), cache.shape.size(), cache.type);
  }
  return run(prompt);
}

std::vector<float> Decoder::step(std::int64_t token) { return run({&token, 1}); }

std::vector<float> Decoder::run(std::span<const std::int64_t> tokens) {
  const std::size_t total = length_ + tokens.size();
  if (total > ones_.size()) throw Error(Exit::input, "the sequence is longer than the capacity that it was started with");

  Ort::IoBinding binding(session_);  // a new one each time: one that has run would write over its outputs
  binding.BindInput("input_ids", tensor(tokens));
  binding.BindInput("attention_mask", tensor(std::span(ones_).first(total)));
  if (positions_wanted_) binding.BindInput("position_ids", tensor(std::span(positions_).subspan(length_, tokens.size())));
  binding.BindOutput("logits", memory_);
  for (const Cache& cache : caches_) {
    binding.BindInput(cache.past.c_str(), cache.value);
    if (shared_) {
      binding.BindOutput(cache.present.c_str(), cache.value);
    } else {
      binding.BindOutput(cache.present.c_str(), memory_);
    }
  }
  session_.Run(Ort::RunOptions(), binding);

  std::vector<Ort::Value> outputs = binding.GetOutputValues();  // in the order in which they were bound
  if (!shared_) {
    for (std::size_t i = 0; i < caches_.size(); ++i) caches_[i].value = std::move(outputs[i + 1]);
  }
  length_ = total;
  return last_row(outputs[0]);
}

// [1, tokens], over numbers that must outlive the run.
Ort::Value Decoder::tensor(std::span<const std::int64_t> numbers) const {
  const std::int64_t shape[] = {1, static_cast<std::int64_t>(numbers.size())};
  auto* data = const_cast<std::int64_t*>(numbers.data());  // ONNX Runtime only reads its inputs
  return Ort::Value::CreateTensor<std::int64_t>(memory_, data, numbers.size(), shape, 2);
}

Answer decode_greedily(Decoder& decoder, const Artifact& artifact, std::span<const std::int64_t> prompt, std::size_t count) {
  const auto context = static_cast<std::size_t>(artifact.context);
  if (prompt.empty() || prompt.size() >= context) {
    throw Error(Exit::input, "a prompt of " + std::to_string(prompt.size()) +
                                 " tokens: it must have at least 1, and leave room in a context of " + std::to_string(context));
  }
  for (const std::int64_t token : prompt) {
    if (token < 0 || token >= artifact.vocabulary) {
      throw Error(Exit::input, "token " + std::to_string(token) + " is not one of the model's " + std::to_string(artifact.vocabulary));
    }
  }
  count = std::min(count, context - prompt.size());
  const auto is_end = [&](std::int64_t token) { return std::ranges::find(artifact.ends, token) != artifact.ends.end(); };
  const auto best = [](const std::vector<float>& logits) { return std::ranges::max_element(logits) - logits.begin(); };

  Answer answer{};
  const auto began = std::chrono::steady_clock::now();
  std::int64_t token = best(decoder.start(prompt, prompt.size() + count));
  answer.time_to_first_token = seconds_since(began);
  const auto first = std::chrono::steady_clock::now();
  std::size_t steps = 0;
  while (!is_end(token)) {
    answer.tokens.push_back(token);
    if (answer.tokens.size() >= count) break;
    token = best(decoder.step(token));
    ++steps;
  }
  answer.time_per_output_token = seconds_since(first) / static_cast<double>(std::max<std::size_t>(steps, 1));
  return answer;
}
