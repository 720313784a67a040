#include "initializers.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <limits>
#include <string_view>

#include "error.hpp"

namespace {

Error damaged(const std::string& reason) { return Error(Exit::input, "model.onnx is damaged: " + reason + ". Build the artifact again."); }

// A field of a protobuf message: a whole number, or bytes, which may be a message again.
struct Field {
  std::uint64_t id = 0, number = 0;
  std::string_view bytes;
};

std::string_view take(std::string_view& rest, std::uint64_t size) {
  if (size > rest.size()) throw damaged("it ends too soon");
  const std::string_view taken = rest.substr(0, size);
  rest.remove_prefix(size);
  return taken;
}

// Seven bits a byte, the lowest first; the eighth says that more follow.
std::uint64_t take_number(std::string_view& rest) {
  std::uint64_t number = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(take(rest, 1).front());
    number |= static_cast<std::uint64_t>(byte & 127) << shift;
    if (byte < 128) return number;
  }
  throw damaged("a number has more than 64 bits");
}

std::vector<Field> fields_of(std::string_view message) {
  std::vector<Field> fields;
  while (!message.empty()) {
    const std::uint64_t key = take_number(message);
    Field& field = fields.emplace_back();
    field.id = key >> 3;
    switch (key & 7) {
      case 0: field.number = take_number(message); break;
      case 1: take(message, 8); break;
      case 2: field.bytes = take(message, take_number(message)); break;
      case 5: take(message, 4); break;
      default: throw damaged("it has a field of an unknown kind");
    }
  }
  return fields;
}

// ONNX's own numbers of the fields that are read here (onnx.proto).
constexpr std::uint64_t model_graph = 7, graph_initializer = 5, entry_key = 1, entry_value = 2;
constexpr std::uint64_t tensor_dims = 1, tensor_type = 2, tensor_name = 8, tensor_external_data = 13;
constexpr std::uint64_t fp32 = 1;

std::string text_of(const std::vector<Field>& fields, std::uint64_t id) {
  const auto found = std::ranges::find(fields, id, &Field::id);
  return found == fields.end() ? std::string() : std::string(found->bytes);
}

Initializer read_one(const Artifact& artifact, const std::vector<Field>& fields) {
  const std::string name = text_of(fields, tensor_name);
  Initializer weight;
  std::string location, offset;
  for (const Field& field : fields) {
    if (field.id == tensor_type && field.number != fp32) {
      throw Error(Exit::input, name + " is not fp32, and this program replaces fp32 adapters alone: build with --precision fp32 or int4");
    }
    if (field.id == tensor_dims) {
      std::string_view packed = field.bytes;
      if (packed.empty()) weight.shape.push_back(static_cast<std::int64_t>(field.number));
      while (!packed.empty()) weight.shape.push_back(static_cast<std::int64_t>(take_number(packed)));
    }
    if (field.id == tensor_external_data) {
      const std::vector<Field> pair = fields_of(field.bytes);
      if (text_of(pair, entry_key) == "location") location = text_of(pair, entry_value);
      if (text_of(pair, entry_key) == "offset") offset = text_of(pair, entry_value);
    }
  }
  std::int64_t count = 1, begin = 0;
  for (const std::int64_t dimension : weight.shape) {
    if (dimension < 1 || count > std::numeric_limits<std::int32_t>::max() / dimension) throw damaged(name + " has an odd shape");
    count *= dimension;
  }
  if (!offset.empty()) {  // without one it is the file's first
    const auto [stop, wrong] = std::from_chars(offset.data(), offset.data() + offset.size(), begin);
    if (wrong != std::errc() || stop != offset.data() + offset.size()) throw damaged(name + " has an odd offset");
  }
  const auto file = artifact.directory / "model.onnx.data";
  const std::int64_t size = count * static_cast<std::int64_t>(sizeof(float)), whole = static_cast<std::int64_t>(file_size(file));
  if (location != file.filename() || begin < 0 || begin > whole - size) throw damaged(name + " does not lie in model.onnx.data");
  weight.numbers.resize(static_cast<std::size_t>(count));
  std::ifstream stream(file, std::ios::binary);
  if (!stream.seekg(begin) || !stream.read(reinterpret_cast<char*>(weight.numbers.data()), size)) throw damaged(name + " cannot be read");
  return weight;
}

}  // namespace

std::map<std::string, Initializer> read_initializers(const Artifact& artifact, const std::vector<std::string>& names) {
  std::ifstream stream(artifact.model(), std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  std::map<std::string, Initializer> found;
  for (const Field& part : fields_of(content)) {
    if (part.id != model_graph) continue;
    for (const Field& node : fields_of(part.bytes)) {
      if (node.id != graph_initializer) continue;
      const std::vector<Field> fields = fields_of(node.bytes);
      const std::string name = text_of(fields, tensor_name);
      if (std::ranges::find(names, name) == names.end()) continue;
      if (!found.emplace(name, read_one(artifact, fields)).second) throw damaged("it has two weights " + name);
    }
  }
  for (const std::string& name : names) {
    if (found.count(name) == 0) throw damaged("it has no weight " + name);
  }
  return found;
}
