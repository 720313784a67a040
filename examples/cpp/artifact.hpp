#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

// A directory that `flora-export build` wrote, with what a decoder has to know of its manifest.json and configuration.
struct Artifact {
  std::filesystem::path directory;
  std::string precision;              // fp32, fp16 or bf16
  bool grouped_attention;             // GroupQueryAttention: keys and values may stay in one buffer
  std::int64_t vocabulary;            // width of the logits
  std::int64_t context;               // how many tokens the model takes
  std::vector<std::int64_t> ends;     // tokens that end an answer

  std::filesystem::path model() const { return directory / "model.onnx"; }
};

// Opens a directory: its manifest must be of schema version 1 and for this program, no older ONNX Runtime than the one that the artifact
// was built with may be running, and every file must have the size and the SHA-256 that the manifest states.
//
// `runtime` is the version of the ONNX Runtime that is running, such as "1.31.1".
// Throws Error: Exit::input where the directory is damaged or no artifact, Exit::runtime where this runtime cannot run it.
Artifact open_artifact(const std::filesystem::path& directory, const std::string& runtime);
