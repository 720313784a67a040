#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "error.hpp"

// A safetensors file: 8 bytes that give the length of a header (little endian), the header (JSON: of each tensor its dtype, shape and
// place), and the tensors' bytes. It is read as a whole, and nothing in the header is believed before it has been checked.
class SafeTensors {
 public:
  // Throws Error(Exit::input): the file is cut off or its header states what cannot be.
  explicit SafeTensors(const std::filesystem::path& file);

  std::size_t size() const { return entries_.size(); }

  bool contains(const std::string& name) const { return entries_.count(name) != 0; }

  // Throws Error(Exit::input): there is no such tensor.
  const std::vector<std::size_t>& shape(const std::string& name) const { return entry(name).shape; }

  // A tensor's numbers in C order. `dtype` is the format's word for T, such as "I64" for std::int64_t.
  // Throws Error(Exit::input): there is no such tensor, or it is of another dtype.
  template <typename T>
  std::vector<T> read(const std::string& name, const std::string& dtype) const {
    const Entry& found = entry(name);
    if (found.dtype != dtype) throw Error(Exit::input, file_ + ": " + name + " is " + found.dtype + ", but must be " + dtype);
    std::vector<T> numbers(found.size / sizeof(T));
    if (!numbers.empty()) std::memcpy(numbers.data(), bytes_.data() + found.begin, numbers.size() * sizeof(T));
    return numbers;
  }

 private:
  struct Entry {
    std::string dtype;
    std::vector<std::size_t> shape;
    std::size_t begin, size;  // in bytes_
  };

  const Entry& entry(const std::string& name) const;

  std::string file_;
  std::vector<char> bytes_;
  std::map<std::string, Entry> entries_;
};
