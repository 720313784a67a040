#include "decoder.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "error.hpp"
#include "stack.hpp"

namespace {

// ONNX Runtime reports to its makers over the network unless this is set before its environment is made. Set it to 0 to let it.
Ort::Env environment() {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  return {ORT_LOGGING_LEVEL_ERROR, "flora"};
}

Ort::SessionOptions session_options(int threads, const Stack* stack) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  if (stack) stack->lend(options);
  return options;
}

template <typename Half>
std::vector<float> widened(const Half* numbers, std::size_t count) {
  std::vector<float> wide(count);
  std::transform(numbers, numbers + count, wide.begin(), [](Half number) { return number.ToFloat(); });
  return wide;
}

// Of each row of logits [batch, tokens, vocabulary] those of its token `last`, as fp32. Throws Error(Exit::input) where they have another
// shape.
Logits rows_of(const Ort::Value& logits, std::span<const std::size_t> last) {
  const auto info = logits.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> shape = info.GetShape();
  if (shape.size() != 3 || shape[0] != std::ssize(last) || shape[1] <= static_cast<std::int64_t>(std::ranges::max(last))) {
    throw Error(Exit::input, "model.onnx gives logits of rank " + std::to_string(shape.size()) +
                                 ", but they must be [batch, tokens, vocabulary], for each token that went in. Build the artifact again.");
  }
  const auto tokens = static_cast<std::size_t>(shape[1]), count = static_cast<std::size_t>(shape[2]);
  Logits rows;
  for (const std::size_t token : last) {
    const std::size_t first = (rows.size() * tokens + token) * count;
    switch (info.GetElementType()) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: {
        const float* numbers = logits.GetTensorData<float>() + first;
        rows.emplace_back(numbers, numbers + count);
        break;
      }
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        rows.push_back(widened(logits.GetTensorData<Ort::Float16_t>() + first, count));
        break;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
        rows.push_back(widened(logits.GetTensorData<Ort::BFloat16_t>() + first, count));
        break;
      default:
        throw Error(Exit::runtime, "logits are neither fp32 nor fp16 nor bf16");
    }
  }
  return rows;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Decoder::Decoder(const Artifact& artifact, int threads, const Stack* stack)
    : env_(environment()),
      session_(env_, artifact.model().c_str(), session_options(threads, stack)),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      shared_(artifact.grouped_attention) {
  const std::string past = "past_key_values.";
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
    const std::string name = session_.GetInputNameAllocated(i, allocator).get();
    positions_wanted_ |= name == "position_ids";
    adapters_wanted_ |= name == "adapter_ids";
    if (name.rfind(past, 0) != 0) continue;
    const Ort::TypeInfo type = session_.GetInputTypeInfo(i);  // it owns what the next line looks at
    const auto info = type.GetTensorTypeAndShapeInfo();
    const auto shape = info.GetShape();  // [batch, heads, past tokens, head size]
    caches_.push_back({name, "present." + name.substr(past.size()), {1, shape.at(1), 0, shape.at(3)}, info.GetElementType()});
  }
}

Logits Decoder::start(std::span<const Request> batch, std::size_t capacity) {
  std::size_t longest = 0;
  for (const Request& row : batch) longest = std::max(longest, row.prompt.size());
  capacity_ = capacity;
  lengths_.clear(), adapters_.clear(), masks_.clear();
  std::vector<std::int64_t> ids(batch.size() * longest, 0), positions(ids.size(), 0);
  std::vector<std::size_t> last;
  for (std::size_t row = 0; row < batch.size(); ++row) {
    const std::vector<std::int64_t>& prompt = batch[row].prompt;
    const std::size_t before = shared_ ? 0 : longest - prompt.size();  // padding
    for (std::size_t i = 0; i < prompt.size(); ++i) {
      ids[row * longest + before + i] = prompt[i];
      positions[row * longest + before + i] = static_cast<std::int64_t>(i);
    }
    last.push_back(before + prompt.size() - 1);
    lengths_.push_back(std::ssize(prompt));
    adapters_.push_back(batch[row].adapter);
    masks_.emplace_back(before, 0).resize(before + prompt.size(), 1);
  }
  Ort::AllocatorWithDefaultOptions allocator;
  for (Cache& cache : caches_) {
    cache.shape[0] = std::ssize(batch);
    cache.shape[2] = shared_ ? static_cast<std::int64_t>(capacity) : 0;
    cache.value = Ort::Value::CreateTensor(allocator, cache.shape.data(), cache.shape.size(), cache.type);
  }
  return run(ids, positions, last);
}

Logits Decoder::step(std::span<const std::int64_t> tokens) {
  std::vector<std::int64_t> ids, positions;
  for (std::size_t row = 0; row < tokens.size(); ++row) {
    const bool goes_on = tokens[row] != ended;
    ids.push_back(goes_on ? tokens[row] : 0);
    lengths_[row] += goes_on;
    positions.push_back(lengths_[row] - 1);
    if (goes_on || !shared_) masks_[row].push_back(goes_on);  // a cache that grows does so in every row
  }
  return run(ids, positions, std::vector<std::size_t>(tokens.size(), 0));
}

// `ids` and `positions` are [batch, tokens]; `last` is the token of each row whose logits are wanted.
Logits Decoder::run(std::span<const std::int64_t> ids, std::span<const std::int64_t> positions, std::span<const std::size_t> last) {
  std::size_t total = 0;
  for (const auto& row : masks_) total = std::max(total, row.size());
  if (std::ranges::max(lengths_) > static_cast<std::int64_t>(capacity_)) {
    throw Error(Exit::input, "a sequence is longer than the capacity that it was started with");
  }
  std::vector<std::int64_t> mask(masks_.size() * total, 0);
  for (std::size_t row = 0; row < masks_.size(); ++row) {
    std::ranges::copy(masks_[row], mask.begin() + static_cast<std::ptrdiff_t>(row * total));
  }

  Ort::IoBinding binding(session_);  // a new one each time: one that has run would write over its outputs
  binding.BindInput("input_ids", tensor(ids));
  binding.BindInput("attention_mask", tensor(mask));
  if (positions_wanted_) binding.BindInput("position_ids", tensor(positions));
  if (adapters_wanted_) {
    const std::int64_t rows = std::ssize(adapters_);
    binding.BindInput("adapter_ids", Ort::Value::CreateTensor<std::int64_t>(memory_, adapters_.data(), adapters_.size(), &rows, 1));
  }
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
  return rows_of(outputs[0], last);
}

// [batch, tokens], over numbers that must outlive the run.
Ort::Value Decoder::tensor(std::span<const std::int64_t> numbers) const {
  const std::int64_t rows = std::ssize(masks_), shape[] = {rows, std::ssize(numbers) / rows};
  auto* data = const_cast<std::int64_t*>(numbers.data());  // ONNX Runtime only reads its inputs
  return Ort::Value::CreateTensor<std::int64_t>(memory_, data, numbers.size(), shape, 2);
}

Answer decode_greedily(Decoder& decoder, const Artifact& artifact, std::span<const Request> batch, std::size_t count) {
  const auto context = static_cast<std::size_t>(artifact.context);
  std::vector<std::size_t> most;  // new tokens of each row
  std::size_t capacity = 0;
  for (const auto& [prompt, adapter] : batch) {
    if (prompt.empty() || prompt.size() >= context) {
      throw Error(Exit::input, "a prompt of " + std::to_string(prompt.size()) +
                                   " tokens: it must have at least 1, and leave room in a context of " + std::to_string(context));
    }
    for (const std::int64_t token : prompt) {
      if (token < 0 || token >= artifact.vocabulary) {
        throw Error(Exit::input, "token " + std::to_string(token) + " is not one of the model's " + std::to_string(artifact.vocabulary));
      }
    }
    most.push_back(std::min(count, context - prompt.size()));
    capacity = std::max(capacity, prompt.size() + most.back());
  }
  const auto is_end = [&](std::int64_t token) { return std::ranges::find(artifact.ends, token) != artifact.ends.end(); };

  Answer answer{};
  answer.tokens.resize(batch.size());
  std::vector<std::int64_t> next(batch.size(), 0);  // of each row, or Decoder::ended
  const auto choose = [&](const Logits& logits) {   // whether any row goes on
    for (std::size_t row = 0; row < batch.size(); ++row) {
      if (next[row] == Decoder::ended) continue;
      next[row] = std::ranges::max_element(logits[row]) - logits[row].begin();
      if (!is_end(next[row])) answer.tokens[row].push_back(next[row]);
      if (is_end(next[row]) || answer.tokens[row].size() == most[row]) next[row] = Decoder::ended;
    }
    return std::ranges::any_of(next, [](std::int64_t token) { return token != Decoder::ended; });
  };
  const auto began = std::chrono::steady_clock::now();
  bool going = choose(decoder.start(batch, capacity));
  answer.time_to_first_token = seconds_since(began);
  const auto first = std::chrono::steady_clock::now();
  std::size_t steps = 0;
  for (; going; ++steps) going = choose(decoder.step(next));
  answer.time_per_output_token = seconds_since(first) / static_cast<double>(std::max<std::size_t>(steps, 1));
  return answer;
}
