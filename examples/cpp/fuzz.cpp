// A fuzz target over everything that this program reads of a stranger: the first byte of an input chooses the reader, the rest is the file.
//
//     cmake -S . -B build -DFLORA_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ with these flags:
//       -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all"
//     FLORA_FUZZ_DIR=DIR build/flora-fuzz CORPUS
//
// DIR has sound files beside the one that is read, and is written to. Without `fuzzer` among the flags there is a main() that reads each
// file of its arguments once.

#include <openssl/evp.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>

#include "adapter.hpp"
#include "artifact.hpp"
#include "error.hpp"
#include "golden.hpp"
#include "initializers.hpp"
#include "safetensors.hpp"
#include "stack.hpp"

namespace fs = std::filesystem;

namespace {

std::string read(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write(const fs::path& file, std::string_view content) {
  std::ofstream(file, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
}

std::string sha256(std::string_view content) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_Digest(content.data(), content.size(), digest, &size, EVP_sha256(), nullptr);
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    char pair[3];
    std::snprintf(pair, sizeof pair, "%02x", digest[i]);
    text += pair;
  }
  return text;
}

// DIR/bank is a sound artifact of layout "stack", DIR/adapter an adapter for it. Each reader has its own copy, so that one file alone is odd.
class Readers {
 public:
  Readers() : home_(std::getenv("FLORA_FUZZ_DIR") ? std::getenv("FLORA_FUZZ_DIR") : "") {
    if (!fs::is_directory(home_ / "bank")) {
      std::fprintf(stderr, "FLORA_FUZZ_DIR must name a directory with bank/ and adapter/\n");
      std::exit(1);
    }
    for (const char* name : {"manifest", "config", "golden", "onnx"}) fs::copy(home_ / "bank", home_ / name, fs::copy_options::recursive);
    for (const char* name : {"weights", "adapter-config"}) fs::copy(home_ / "adapter", home_ / name, fs::copy_options::recursive);
    sound_ = open_artifact(home_ / "bank", "onnxruntime", "cpu");
    stack_.emplace(*sound_);
    manifest_ = nlohmann::json::parse(read(home_ / "bank" / "manifest.json"));
  }

  void read_one(char reader, std::string_view content) {
    Artifact artifact = *sound_;
    switch (reader) {
      case 'S':
        write(home_ / "tensors", content);
        static_cast<void>(SafeTensors(home_ / "tensors"));
        break;
      case 'G':
        artifact.directory = home_ / "golden";
        write(artifact.directory / "golden.safetensors", content);
        static_cast<void>(read_golden(artifact));
        break;
      case 'O':
        artifact.directory = home_ / "onnx";
        write(artifact.model(), content);
        static_cast<void>(Stack(artifact));
        break;
      case 'M':
        write(home_ / "manifest" / "manifest.json", content);
        use(open_artifact(home_ / "manifest", "onnxruntime", "cpu"));
        break;
      case 'C':
        manifest_["files"]["config.json"] = {{"bytes", content.size()}, {"sha256", sha256(content)}};
        write(home_ / "config" / "config.json", content);
        write(home_ / "config" / "manifest.json", manifest_.dump());
        use(open_artifact(home_ / "config", "onnxruntime", "cpu"));
        break;
      case 'W':
        write(home_ / "weights" / "adapter_model.safetensors", content);
        static_cast<void>(read_adapter(home_ / "weights" / "adapter_model.safetensors", artifact, *stack_));
        break;
      case 'A':
        write(home_ / "adapter-config" / "adapter_config.json", content);
        static_cast<void>(read_adapter(home_ / "adapter-config" / "adapter_model.safetensors", artifact, *stack_));
        break;
      default: break;
    }
  }

 private:
  // What main() asks of an artifact before it loads the model.
  static void use(const Artifact& artifact) {
    check_runtime(artifact, "99.0.0");
    if (!artifact.bank) return;
    for (const std::string& name : artifact.bank->names) static_cast<void>(artifact.bank->slot(name.empty() ? "0" : name));
    static_cast<void>(Stack(artifact));
  }

  fs::path home_;
  std::optional<Artifact> sound_;
  std::optional<Stack> stack_;
  nlohmann::json manifest_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static Readers readers;
  if (size == 0) return 0;
  try {
    readers.read_one(static_cast<char>(data[0]), {reinterpret_cast<const char*>(data) + 1, size - 1});
  } catch (const Error&) {  // a refusal, as it should be
  }
  return 0;
}

#ifdef FLORA_FUZZ_MAIN
int main(int count, char** arguments) {
  for (const char* name : std::span(arguments, static_cast<std::size_t>(count)).subspan(1)) {
    const std::string content = read(name);
    std::fprintf(stderr, "%s\n", name);  // the last of them is what it died of
    LLVMFuzzerTestOneInput(reinterpret_cast<const unsigned char*>(content.data()), content.size());
  }
}
#endif
