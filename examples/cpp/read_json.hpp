#pragma once

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "error.hpp"

// A file of JSON. Throws Error(Exit::input), with this remedy: it cannot be read, or is something else.
inline nlohmann::json read_json(const std::filesystem::path& file, const std::string& remedy) {
  std::ifstream stream(file);
  if (!stream) throw Error(Exit::input, file.string() + " cannot be read. " + remedy);
  try {
    return nlohmann::json::parse(stream);
  } catch (const nlohmann::json::exception& error) {
    throw Error(Exit::input, file.string() + " is not JSON (" + error.what() + "). " + remedy);
  }
}
