#include "golden.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "error.hpp"
#include "safetensors.hpp"

namespace {

// The largest error that is allowed, relative to the largest logit or to 1, by precision; as in flora_export/verify/numerics.py.
const std::map<std::string, double> tolerances = {{"fp32", 1e-4}, {"fp16", 1e-2}, {"bf16", 5e-2}, {"int8", 0.15}, {"int4", 0.15}};

}  // namespace

std::vector<GoldenPrompt> read_golden(const Artifact& artifact) {
  const auto file = artifact.directory / "golden.safetensors";
  if (!artifact.golden) {
    throw Error(Exit::input,
                "manifest.json lists no golden.safetensors: the artifact was built with --no-verify. Build it with verification.");
  }
  const SafeTensors tensors(file);
  const auto vocabulary = static_cast<std::size_t>(artifact.vocabulary);
  const auto outside = [&](std::int64_t token) { return token < 0 || token >= artifact.vocabulary; };
  std::vector<GoldenPrompt> all;
  for (std::size_t i = 0; i == 0 || tensors.contains("prompt." + std::to_string(i) + ".input_ids"); ++i) {
    const std::string name = "prompt." + std::to_string(i);
    GoldenPrompt one;
    std::vector<std::int64_t>& prompt = one.request.prompt = tensors.read<std::int64_t>(name + ".input_ids", "I64");
    one.tokens = tensors.read<std::int64_t>(name + ".tokens", "I64");
    one.logits = tensors.read<float>(name + ".logits", "F32");
    if (prompt.empty() || one.tokens.empty() || std::ranges::any_of(prompt, outside) || std::ranges::any_of(one.tokens, outside) ||
        tensors.shape(name + ".logits") != std::vector{one.tokens.size(), vocabulary}) {
      throw Error(Exit::input, file.string() + " is damaged: " + name + " must be tokens below " + std::to_string(vocabulary) +
                                   ", and the logits of each of its answers");
    }
    if (artifact.bank) {
      const std::vector<std::int64_t> adapter = tensors.read<std::int64_t>(name + ".adapter", "I64");
      if (adapter.size() != 1 || !artifact.bank->taken(adapter[0])) {
        throw Error(Exit::input, file.string() + " is damaged: " + name + ".adapter is no slot that is taken");
      }
      one.request.adapter = adapter[0];
    }
    all.push_back(std::move(one));
  }
  return all;
}

double replay(Decoder& decoder, const Artifact& artifact, const GoldenPrompt& golden) {
  const auto tolerance = tolerances.find(artifact.precision);
  if (tolerance == tolerances.end()) throw Error(Exit::input, "manifest.json has precision '" + artifact.precision + "'");

  double error = 0, largest = 1;
  const float* expected = golden.logits.data();
  Logits rows = decoder.start({&golden.request, 1}, golden.request.prompt.size() + golden.tokens.size());
  for (std::size_t step = 0;; ++step) {
    const std::vector<float>& logits = rows[0];
    if (logits.size() != static_cast<std::size_t>(artifact.vocabulary)) {
      throw Error(Exit::input, "model.onnx gives " + std::to_string(logits.size()) + " logits, but manifest.json says " +
                                   std::to_string(artifact.vocabulary));
    }
    for (const float logit : logits) {
      const double off = std::abs(static_cast<double>(logit) - *expected);
      error = std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(error, off);
      largest = std::max(largest, std::abs(static_cast<double>(*expected++)));
    }
    if (step + 1 == golden.tokens.size()) break;
    rows = decoder.step({&golden.tokens[step], 1});
  }
  return error / (tolerance->second * largest);
}
