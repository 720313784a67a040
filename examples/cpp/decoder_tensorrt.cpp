// NOT COMPILED AND NOT RUN HERE: there was no TensorRT and no GPU. Compile it against TensorRT 11 or newer and the CUDA runtime, and replay
// the golden vectors (golden.cpp) before you trust it.
//
// The counterpart of decoder.cpp for OUT/model.engine, for one sequence and one adapter (no bank): the same two calls, `start` and `step`,
// with the KV cache on the device throughout.
//
//   const Artifact artifact = open_artifact(out, "tensorrt", "cuda");     // schema version, hashes of every file
//   TensorRTDecoder decoder(artifact);
//   std::vector<float> logits = decoder.start(prompt);

#include <NvInfer.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "artifact.hpp"
#include "error.hpp"

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Error(Exit::runtime, std::string("CUDA: ") + cudaGetErrorString(error));
}

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "TensorRT: %s\n", message);
  }
};

// Memory of the device. It grows, and never shrinks; what was in it is lost when it grows.
class Buffer {
 public:
  void* reserve(std::size_t bytes) {
    if (bytes > size_ || !data_) {
      void* fresh = nullptr;
      check(cudaMalloc(&fresh, bytes ? bytes : 1));
      data_.reset(fresh);
      size_ = bytes;
    }
    return data_.get();
  }
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { cudaFree(data); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t size_ = 0;
};

std::size_t size_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return 4;
    case nvinfer1::DataType::kHALF: return 2;
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT64: return 8;
    default: throw Error(Exit::runtime, "the engine has a tensor of a type that no decoder of flora-export has");
  }
}

}  // namespace

class TensorRTDecoder {
 public:
  explicit TensorRTDecoder(const Artifact& artifact) : vocabulary_(static_cast<std::size_t>(artifact.vocabulary)) {
    std::ifstream stream(artifact.directory / "model.engine", std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (!engine_) throw Error(Exit::runtime, "TensorRT refuses model.engine: make it on this machine with `flora-export rebuild`");
    cudaStream_t stream_made = nullptr;
    check(cudaStreamCreate(&stream_made));
    stream_.reset(stream_made);
    for (const int profile : {prefill, decode}) {
      contexts_[profile].reset(engine_->createExecutionContext());
      if (!contexts_[profile] || !contexts_[profile]->setOptimizationProfileAsync(profile, stream_.get())) {
        throw Error(Exit::runtime, "the engine has no profiles for prefill and decode");
      }
    }
    check(cudaStreamSynchronize(stream_.get()));
    const std::string past = "past_key_values.";
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      positions_wanted_ |= name == "position_ids";
      if (name.rfind(past, 0) != 0) continue;
      const nvinfer1::Dims shape = engine_->getTensorShape(name.c_str());  // [batch, heads, past, head size]
      if (shape.d[2] > 0) throw Error(Exit::input, "the engine has a static cache; this program has one that grows");
      caches_.push_back({name, "present." + name.substr(past.size()), shape, size_of(engine_->getTensorDataType(name.c_str())), {}, {}});
    }
  }

  // Prefill. Returns the logits [vocabulary] after the prompt.
  std::vector<float> start(std::span<const std::int64_t> prompt) {
    length_ = 0;
    return run(prompt, prefill);
  }

  // Appends one token. Returns the logits [vocabulary] after it.
  std::vector<float> step(std::int64_t token) { return run({&token, 1}, decode); }

 private:
  static constexpr int prefill = 0, decode = 1;  // optimization profiles

  struct Cache {
    std::string past, present;
    nvinfer1::Dims shape;
    std::size_t element;
    Buffer before, after;
    std::size_t bytes(std::size_t tokens) const { return tokens * static_cast<std::size_t>(shape.d[1] * shape.d[3]) * element; }
  };

  std::vector<float> run(std::span<const std::int64_t> tokens, int profile) {
    nvinfer1::IExecutionContext& context = *contexts_[profile];
    const std::size_t total = length_ + tokens.size();
    const std::vector<std::int64_t> mask(total, 1);
    std::vector<std::int64_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), static_cast<std::int64_t>(length_));
    feed(context, "input_ids", tokens, ids_);
    feed(context, "attention_mask", mask, mask_);
    if (positions_wanted_) feed(context, "position_ids", positions, positions_);
    for (Cache& cache : caches_) {
      nvinfer1::Dims shape = cache.shape;
      shape.d[0] = 1;
      shape.d[2] = static_cast<std::int64_t>(length_);
      if (!context.setInputShape(cache.past.c_str(), shape)) throw Error(Exit::input, "the sequence is longer than the engine's profile");
      bind(context, cache.past, cache.before.reserve(cache.bytes(length_)));
      bind(context, cache.present, cache.after.reserve(cache.bytes(total)));
    }
    const nvinfer1::DataType type = engine_->getTensorDataType("logits");
    const std::size_t row = vocabulary_ * size_of(type);
    bind(context, "logits", logits_.reserve(tokens.size() * row));
    if (!context.enqueueV3(stream_.get())) throw Error(Exit::runtime, "the engine failed");

    std::vector<char> last(row);
    check(cudaMemcpyAsync(last.data(), static_cast<char*>(logits_.get()) + (tokens.size() - 1) * row, row, cudaMemcpyDeviceToHost,
                          stream_.get()));
    check(cudaStreamSynchronize(stream_.get()));  // `mask` and `positions` were read by now, too
    for (Cache& cache : caches_) std::swap(cache.before, cache.after);
    length_ = total;
    return widened(last, type);
  }

  // An input [1, tokens].
  void feed(nvinfer1::IExecutionContext& context, const std::string& name, std::span<const std::int64_t> numbers, Buffer& buffer) {
    void* data = buffer.reserve(numbers.size_bytes());
    check(cudaMemcpyAsync(data, numbers.data(), numbers.size_bytes(), cudaMemcpyHostToDevice, stream_.get()));
    nvinfer1::Dims shape{};
    shape.nbDims = 2;
    shape.d[0] = 1;
    shape.d[1] = static_cast<std::int64_t>(numbers.size());
    if (!context.setInputShape(name.c_str(), shape)) throw Error(Exit::input, name + " is longer than the engine's profile");
    bind(context, name, data);
  }

  static void bind(nvinfer1::IExecutionContext& context, const std::string& name, void* data) {
    if (!context.setTensorAddress(name.c_str(), data)) throw Error(Exit::runtime, "the engine has no tensor " + name);
  }

  std::vector<float> widened(const std::vector<char>& bytes, nvinfer1::DataType type) const {
    std::vector<float> wide(vocabulary_);
    for (std::size_t i = 0; i < vocabulary_; ++i) {
      if (type == nvinfer1::DataType::kFLOAT) wide[i] = reinterpret_cast<const float*>(bytes.data())[i];
      if (type == nvinfer1::DataType::kHALF) wide[i] = __half2float(reinterpret_cast<const __half*>(bytes.data())[i]);
      if (type == nvinfer1::DataType::kBF16) wide[i] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(bytes.data())[i]);
    }
    return wide;
  }

  struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };

  std::size_t vocabulary_, length_ = 0;
  bool positions_wanted_ = false;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  std::unique_ptr<CUstream_st, DestroyStream> stream_;
  Buffer ids_, mask_, positions_, logits_;
  std::vector<Cache> caches_;
};
