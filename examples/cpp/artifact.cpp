#include "artifact.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "error.hpp"
#include "read_json.hpp"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int schema_version = 1;
constexpr char rebuild[] = "Build the artifact again.";

std::string sha256(const fs::path& file) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) throw Error(Exit::runtime, "OpenSSL has no SHA-256");
  std::ifstream stream(file, std::ios::binary);
  std::vector<char> chunk(1 << 20);
  while (stream) {
    stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    EVP_DigestUpdate(context.get(), chunk.data(), static_cast<std::size_t>(stream.gcount()));
  }
  if (!stream.eof()) throw Error(Exit::input, file.string() + " cannot be read");
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  EVP_DigestFinal_ex(context.get(), digest.data(), &size);
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    constexpr char digits[] = "0123456789abcdef";
    text += {digits[digest[i] >> 4], digits[digest[i] & 15]};
  }
  return text;
}

void check_file(const fs::path& directory, const std::string& name, const json& known) {
  if (fs::path(name).filename() != name) throw Error(Exit::input, "manifest.json names '" + name + "', which leaves the directory");
  const fs::path file = directory / name;
  if (!fs::is_regular_file(file)) throw Error(Exit::input, file.string() + " is missing. Copy the artifact again.");
  if (fs::file_size(file) != known.at("bytes").get<std::uintmax_t>() || sha256(file) != known.at("sha256").get<std::string>()) {
    throw Error(Exit::input, file.string() + " is not the file that was built: its size or SHA-256 differs from the manifest's");
  }
}

// "1.31.1" -> (1, 31).
std::pair<int, int> minor_version(const std::string& text) {
  std::istringstream stream(text);
  int major = 0, minor = 0;
  char dot = 0;
  if (!(stream >> major >> dot >> minor) || dot != '.') throw Error(Exit::input, "'" + text + "' is no version of ONNX Runtime");
  return {major, minor};
}

// The tokens that end an answer: of generation_config.json where `files`, the manifest's, has it, or else of config.json. One number, a
// list of them, or none.
std::vector<std::int64_t> end_tokens(const fs::path& directory, const json& files, const json& config) {
  json ends;
  const std::string generation = "generation_config.json";
  if (files.contains(generation)) ends = read_json(directory / generation, rebuild).value("eos_token_id", json());
  if (ends.is_null()) ends = config.value("eos_token_id", json());
  if (ends.is_null()) return {};
  return ends.is_array() ? ends.get<std::vector<std::int64_t>>() : std::vector<std::int64_t>{ends.get<std::int64_t>()};
}

// How many tokens the model takes. Without max_position_embeddings it is 2048, as for flora-export.
std::int64_t context_length(const json& config) {
  const json context = config.value("max_position_embeddings", json(2048));
  constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();  // GroupQueryAttention counts tokens in 32 bits
  if (!context.is_number_integer() || context < 1 || context > largest) {
    throw Error(Exit::input, "config.json: max_position_embeddings is " + context.dump() + ", but must be a whole number from 1 to " +
                                 std::to_string(largest) + ". Build the artifact again.");
  }
  return context.get<std::int64_t>();
}

Bank read_bank(const json& manifest) {
  const json& known = manifest.at("bank");
  Bank bank{known.at("layout"), known.at("names"), {}};
  for (const json& block : manifest.at("blocks")) bank.blocks.push_back({block.at("block"), block.at("activation")});
  return bank;
}

}  // namespace

std::int64_t Bank::slot(const std::string& name) const {
  if (name == "base") return base_model;
  if (const auto found = std::ranges::find(names, name); !name.empty() && found != names.end()) return found - names.begin();
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error == std::errc() && end == name.data() + name.size() && number >= 0 && number < std::ssize(names)) return number;
  throw Error(Exit::input, "there is no adapter '" + name + "'; there are " + all_names());
}

std::string Bank::all_names() const {
  std::string text;
  for (const std::string& name : names) text += name.empty() ? "" : name + ", ";
  return text + "base; and the slots 0 to " + std::to_string(names.size() - 1);
}

Artifact open_artifact(const fs::path& directory, const std::string& backend, const std::string& target) {
  const json manifest = read_json(directory / "manifest.json", "Is the directory one that flora-export built? If so, build it again.");
  try {
    if (const json version = manifest.at("schema_version"); version != schema_version) {
      throw Error(Exit::input, "manifest.json has schema version " + version.dump() + ", but this program reads " +
                                   std::to_string(schema_version) + ". Build the artifact again.");
    }
    if (manifest.at("backend") != backend || manifest.at("target") != target) {
      throw Error(Exit::runtime, "the artifact is for " + manifest.at("backend").dump() + " on " + manifest.at("target").dump() +
                                     "; this program runs " + backend + " on " + target);
    }
    const json& files = manifest.at("files");
    for (const char* name : {"model.onnx", "model.onnx.data", "config.json"}) static_cast<void>(files.at(name));  // no less
    for (const auto& [name, known] : files.items()) check_file(directory, name, known);

    const json config = read_json(directory / "config.json", rebuild);
    Artifact artifact{};
    artifact.directory = directory;
    artifact.precision = manifest.at("precision");
    artifact.onnxruntime = manifest.at("versions").at("onnxruntime");
    artifact.golden = files.contains("golden.safetensors");
    artifact.grouped_attention = manifest.at("padding") == "right";  // these graphs count a row's tokens from the left
    for (const json& output : manifest.at("outputs")) {
      if (output.at("name") == "logits") artifact.vocabulary = output.at("shape").at(2);
    }
    artifact.context = context_length(config);
    artifact.ends = end_tokens(directory, files, config);
    if (manifest.contains("bank")) artifact.bank = read_bank(manifest);
    return artifact;
  } catch (const json::exception& error) {
    throw Error(Exit::input, (directory / "manifest.json").string() + " or a configuration is not what flora-export writes (" +
                                 error.what() + "). Build the artifact again.");
  }
}

void check_runtime(const Artifact& artifact, const std::string& running) {
  if (minor_version(running) < minor_version(artifact.onnxruntime)) {
    throw Error(Exit::runtime, "the artifact was built with ONNX Runtime " + artifact.onnxruntime + ", but " + running +
                                   " is running: use that version or a newer one");
  }
}
