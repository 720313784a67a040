#pragma once

#include <cstdint>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

constexpr std::int64_t base_model = -1;  // in place of an adapter's slot

// A block of the base model with adapters beside it, and what they have between A and B.
struct Block {
  std::string name, activation;
};

// Several adapters in one graph, by slot. An empty slot has the name "".
struct Bank {
  std::string layout;
  std::vector<std::string> names;
  std::vector<Block> blocks;

  // The slot of an adapter by its name or its number, or of the base model by the name "base". Throws Error(Exit::input) with the names
  // that there are.
  std::int64_t slot(const std::string& name) const;
  std::string all_names() const;
  bool taken(std::int64_t slot) const { return slot >= 0 && slot < std::ssize(names) && !names[static_cast<std::size_t>(slot)].empty(); }
};

// A directory that `flora-export build` wrote, with what a decoder has to know of its manifest.json and configuration.
struct Artifact {
  std::filesystem::path directory;
  std::string precision;              // fp32, fp16 or bf16
  std::string onnxruntime;            // version that it was built with
  bool golden;                        // the manifest lists golden.safetensors
  bool grouped_attention;             // GroupQueryAttention: keys and values may stay in one buffer
  std::int64_t vocabulary;            // width of the logits
  std::int64_t context;               // how many tokens the model takes
  std::vector<std::int64_t> ends;     // tokens that end an answer
  std::optional<Bank> bank;           // where the graph holds several adapters

  std::filesystem::path model() const { return directory / "model.onnx"; }
};

// Opens a directory: its manifest must be of schema version 1 and for this backend and target, and every file must have the size and the
// SHA-256 that the manifest states. Files that the manifest does not list are not read.
// Throws Error: Exit::input where the directory is damaged or no artifact, Exit::runtime where it is for something else.
Artifact open_artifact(const std::filesystem::path& directory, const std::string& backend, const std::string& target);

// Throws Error(Exit::runtime) where an older ONNX Runtime is running than the one that the artifact was built with. Minor versions count:
// they add operators and mend kernels.
void check_runtime(const Artifact& artifact, const std::string& running);
