#include "adapter.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "error.hpp"
#include "read_json.hpp"
#include "safetensors.hpp"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// adapter_config.json, as far as it says what the tensors mean; the rules are those of flora_export/methods/ffba.py and branch.py.
class Configuration {
 public:
  explicit Configuration(const fs::path& file) : file_(file), content_(read_json(file, "It must lie beside the adapter's weights.")) {
    if (!content_.is_object()) throw Error(Exit::input, file.string() + " is no JSON object");
    check("peft_type", get("peft_type", json()) == "FFBA", "this program reads FFBA");
    const json version = get("ffba_version", 0);
    check("ffba_version", version.is_number_integer() && (version == 0 || version == 1), "this program reads versions 0 and 1");
    const json r = get("r", json()), alpha = get("alpha", json()), gain = get("gated_gain", version == 0 ? 1.0 : 16.0);
    check("r", r.is_number_integer() && r >= 1 && r < 1 << 30, "a rank is a whole number of at least 1");
    check("alpha", is_number(alpha), "must be a finite number");
    check("gated_gain", is_number(gain), "must be a finite number");
    const json root = get("use_rslora", false);
    check("use_rslora", root.is_boolean(), "must be true or false");
    check("rank_pattern", is_empty("rank_pattern"), "this program reads adapters of one rank: build a bank with it in Python");
    check("modules_to_save", is_empty("modules_to_save"), "only FFBA branches have a place in a bank");
    targets_ = get("target_modules", {"self_attn", "mlp"});
    check("target_modules", is_list(targets_, &json::is_string) && !targets_.empty(), "this program reads a list of block names");
    if (!is_empty("exclude_modules")) excluded_ = get("exclude_modules", json());
    check("exclude_modules", is_list(excluded_, &json::is_string), "this program reads a list of block names, or null");
    if (!is_empty("layers_to_transform")) layers_ = get("layers_to_transform", json());
    if (layers_.is_number()) layers_ = json::array({layers_});
    check("layers_to_transform", is_list(layers_, &json::is_number_integer), "must be layer indices or null");

    rank = r;
    const double numerator = alpha, divisor = static_cast<double>(rank);
    scale_ = numerator / (root ? std::sqrt(divisor) : divisor);
    gain_ = gain;
  }

  std::int64_t rank = 0;

  // Whether there is a branch beside a block.
  bool selects(const Block& block) const {
    const auto is_its_name = [&](const std::string& name) { return block.name == name || block.name.ends_with('.' + name); };
    const auto among = [&](const json& names) { return std::ranges::any_of(names, is_its_name); };
    const auto is_its_layer = [&](const json& layer) { return layer == layer_of(block); };
    return among(targets_) && !among(excluded_) && (layers_.empty() || std::ranges::any_of(layers_, is_its_layer));
  }

  void check_activation(const Block& block) const {
    const bool attention = block.name.ends_with(".self_attn");
    const std::string key = attention ? "attn_activation" : "mlp_activation";
    check(key, get(key, attention ? "identity" : "gated") == block.activation, "the bank has " + block.activation + " at " + block.name);
  }

  // What B is multiplied by.
  float scale(const Block& block) const { return static_cast<float>(block.activation == "gated" ? gain_ * scale_ : scale_); }

 private:
  json get(const std::string& key, const json& otherwise) const { return content_.contains(key) ? content_.at(key) : otherwise; }

  bool is_empty(const std::string& key) const { return !content_.contains(key) || content_.at(key).empty(); }  // null is

  static bool is_list(const json& value, bool (json::*of)() const noexcept) {
    return value.is_array() && std::ranges::all_of(value, [&](const json& item) { return (item.*of)(); });
  }

  static bool is_number(const json& value) { return value.is_number() && std::abs(value.get<double>()) < 1e30; }

  // "model.layers.3.mlp" -> 3
  static std::int64_t layer_of(const Block& block) {
    std::int64_t layer = -1;
    const std::size_t end = block.name.rfind('.');
    if (end == std::string::npos || end == 0) return layer;
    const std::size_t begin = block.name.rfind('.', end - 1) + 1;
    std::from_chars(block.name.data() + begin, block.name.data() + end, layer);
    return layer;
  }

  void check(const std::string& key, bool right, const std::string& expected) const {
    if (!right) throw Error(Exit::input, file_.string() + ": " + key + " is " + get(key, json()).dump() + ", but " + expected);
  }

  fs::path file_;
  json content_, targets_, excluded_ = json::array(), layers_ = json::array();
  double scale_ = 0, gain_ = 1;
};

}  // namespace

Layers read_adapter(const fs::path& file, const Artifact& artifact, const Stack& stack) {
  const Configuration configuration(file.parent_path() / "adapter_config.json");
  const SafeTensors tensors(file);
  const auto refuse = [&](const std::string& reason) { throw Error(Exit::input, file.string() + ": " + reason); };

  Layers layers;
  std::size_t read = 0;
  for (const Block& block : artifact.bank->blocks) {
    const bool selected = configuration.selects(block);
    if (selected) configuration.check_activation(block);
    for (const std::string& matrix : matrices(block)) {
      const std::string name = stack_name(block, matrix), key = "base_model.model." + block.name + ".ffba_" + matrix + ".weight";
      const std::vector<std::int64_t> shape = stack.layer_shape(name);
      const bool is_b = matrix == "B";
      const auto rows = static_cast<std::size_t>(shape[0]), columns = static_cast<std::size_t>(shape[1]);
      std::vector<float>& layer = layers[name];
      layer.assign(rows * columns, 0);
      if (!selected) continue;

      const std::size_t rank = static_cast<std::size_t>(configuration.rank), room = is_b ? rows : columns, width = is_b ? columns : rows;
      if (rank > room) refuse("its rank is " + std::to_string(rank) + ", but " + name + " has room for " + std::to_string(room));
      if (tensors.shape(key) != (is_b ? std::vector{width, rank} : std::vector{rank, width})) {
        refuse(key + " has another shape than width " + std::to_string(width) + " and rank " + std::to_string(rank) +
               " make. Trained on another base model?");
      }
      const std::vector<float> numbers = tensors.read<float>(key, "F32");
      const float scale = is_b ? configuration.scale(block) : 1;
      const std::size_t height = is_b ? width : rank, across = is_b ? rank : width;  // of the tensor, whose transpose the layer is
      for (std::size_t i = 0; i < height; ++i) {
        for (std::size_t j = 0; j < across; ++j) layer[j * columns + i] = numbers[i * across + j] * scale;
      }
      if (!std::ranges::all_of(layer, [](float number) { return std::isfinite(number); })) {
        refuse(key + " holds numbers that are not finite, or are not when they are scaled");
      }
      ++read;
    }
  }
  if (read == 0) refuse("its configuration selects no block of the bank");
  if (read != tensors.size()) {
    refuse(std::to_string(tensors.size()) + " tensors, but the bank and the configuration have a place for " + std::to_string(read));
  }
  return layers;
}
