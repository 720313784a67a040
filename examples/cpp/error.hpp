#pragma once

#include <stdexcept>
#include <string>

// Exit codes, the same as those of the command `flora-export`.
enum class Exit { done = 0, failed = 1, input = 2, runtime = 3 };

// Whatever goes wrong on purpose: a message that says what, where and the remedy, and the exit code of the program.
class Error : public std::runtime_error {
 public:
  Error(Exit code, const std::string& message) : std::runtime_error(message), code(code) {}

  const Exit code;
};
