#include "safetensors.hpp"

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

namespace {

// Of the dtypes that golden vectors and adapters have.
const std::map<std::string, std::size_t> dtype_sizes = {{"I64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}};

constexpr std::size_t length_size = 8;

}  // namespace

SafeTensors::SafeTensors(const std::filesystem::path& file) : file_(file.string()) {
  const auto damaged = [this](const std::string& reason) { return Error(Exit::input, file_ + " is damaged: " + reason); };

  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Error(Exit::input, file_ + " cannot be read");
  bytes_.resize(std::filesystem::file_size(file));
  if (!stream.read(bytes_.data(), static_cast<std::streamsize>(bytes_.size())) || bytes_.size() < length_size) throw damaged("too short");

  std::uint64_t length = 0;
  for (std::size_t i = length_size; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes_[i]);
  if (length > bytes_.size() - length_size) throw damaged("its header would have " + std::to_string(length) + " bytes, more than the file");
  const std::size_t start = length_size + length, room = bytes_.size() - start;

  try {
    const auto header = nlohmann::json::parse(bytes_.begin() + length_size, bytes_.begin() + static_cast<std::ptrdiff_t>(start));
    for (const auto& [name, item] : header.items()) {
      if (name == "__metadata__") continue;
      Entry entry{item.at("dtype"), item.at("shape"), 0, 0};
      const auto begin = item.at("data_offsets").at(0).get<std::size_t>(), end = item.at("data_offsets").at(1).get<std::size_t>();
      if (begin > end || end > room) throw damaged(name + " lies outside the file");
      entry.begin = start + begin;
      entry.size = end - begin;

      std::size_t expected = dtype_sizes.at(entry.dtype);
      for (const std::size_t dimension : entry.shape) {
        if (dimension != 0 && expected > std::numeric_limits<std::size_t>::max() / dimension) throw damaged(name + " is too large");
        expected *= dimension;
      }
      if (expected != entry.size) throw damaged(name + " has another size than its shape");
      entries_.emplace(name, std::move(entry));
    }
  } catch (const nlohmann::json::exception& error) {
    throw damaged(error.what());
  } catch (const std::out_of_range&) {
    throw damaged("it has a tensor of another dtype than I64, F32, F16 and BF16");
  }
}

const SafeTensors::Entry& SafeTensors::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) throw Error(Exit::input, file_ + " has no tensor " + name);
  return found->second;
}
