// Opens an artifact, proves that it computes here what was recorded when it was built, and decodes greedily.

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <utility>

#include "adapter.hpp"
#include "artifact.hpp"
#include "decoder.hpp"
#include "error.hpp"
#include "golden.hpp"
#include "stack.hpp"

namespace {

constexpr char usage[] =
    "usage: flora-decode OUT [--prompt ID,ID,...]... [--adapter NAME]... [--swap NAME=FILE] [--tokens N] [--threads N]\n"
    "\n"
    "Checks OUT, a directory that `flora-export build` wrote, replays its golden vectors, and decodes greedily, all prompts as one batch.\n"
    "Prints a line of token ids for each prompt, and times on stderr.\n"
    "\n"
    "  --prompt   token ids; without it, the recorded prompts\n"
    "  --adapter  of a bank: which adapter answers, by name or slot, or base; once for all prompts, or once for each, in order\n"
    "  --swap     of a bank of layout stack: decodes, puts FILE (an adapter_model.safetensors) in place of an adapter, by name or slot,\n"
    "             decodes, puts back what was there, and decodes\n"
    "  --tokens   how many to decode at most (16)\n"
    "  --threads  of one operator; 0 leaves it to ONNX Runtime (0)\n"
    "\n"
    "Exit codes: 0 done; 1 the golden vectors do not replay; 2 wrong use or a damaged artifact; 3 ONNX Runtime failed.\n";

struct Options {
  std::string out, swap;
  std::vector<std::vector<std::int64_t>> prompts;
  std::vector<std::string> adapters;
  std::size_t tokens = 16;
  int threads = 0;
};

template <typename Number>
Number parse(const std::string& text, const std::string& option) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0) {
    throw Error(Exit::input, option + ": '" + text + "' is not a whole number");
  }
  return number;
}

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name.rfind("--", 0) != 0 && options.out.empty()) {
      options.out = name;
      continue;
    }
    if (i + 1 == arguments.size()) throw Error(Exit::input, name + " is not understood\n" + usage);
    const std::string& value = arguments[++i];
    if (name == "--prompt") {
      std::vector<std::int64_t>& prompt = options.prompts.emplace_back();
      std::istringstream stream(value);
      for (std::string id; std::getline(stream, id, ',');) prompt.push_back(parse<std::int64_t>(id, name));
    } else if (name == "--adapter") {
      options.adapters.push_back(value);
    } else if (name == "--swap" && options.swap.empty() && value.find('=') != std::string::npos) {
      options.swap = value;
    } else if (name == "--tokens") {
      options.tokens = parse<std::size_t>(value, name);
    } else if (name == "--threads") {
      options.threads = parse<int>(value, name);
    } else {
      throw Error(Exit::input, name + " is not understood\n" + usage);
    }
  }
  if (options.out.empty() || options.tokens == 0) throw Error(Exit::input, usage);
  return options;
}

// The slot that --swap names, and its file.
std::pair<std::int64_t, std::string> parse_swap(const std::string& text, const Bank& bank) {
  const std::size_t sign = text.find('=');
  const std::int64_t slot = bank.slot(text.substr(0, sign));
  if (slot == base_model) throw Error(Exit::input, "--swap: the base model is in no slot");
  return {slot, text.substr(sign + 1)};
}

// The batch: the prompts, or else the recorded ones, each with its adapter. `filled` is a slot that may be empty yet.
std::vector<Request> requests_of(const Options& options, const Artifact& artifact, const std::vector<GoldenPrompt>& recorded,
                                 std::int64_t filled) {
  std::vector<Request> batch;
  for (const std::vector<std::int64_t>& prompt : options.prompts) batch.push_back({prompt});
  if (batch.empty()) std::ranges::transform(recorded, std::back_inserter(batch), &GoldenPrompt::request);
  const std::vector<std::string>& names = options.adapters;
  if (!artifact.bank) {
    if (!names.empty()) throw Error(Exit::input, "--adapter: the artifact holds one adapter, so there is none to choose");
    return batch;
  }
  const Bank& bank = *artifact.bank;
  if (names.empty() && options.prompts.empty()) return batch;  // each recorded prompt with its own
  if (names.empty()) throw Error(Exit::input, "the artifact is a bank: say with --adapter which one answers: " + bank.all_names());
  if (names.size() != 1 && names.size() != batch.size()) {
    throw Error(Exit::input, "--adapter is there " + std::to_string(names.size()) + " times: give it once, or for each of the " +
                                 std::to_string(batch.size()) + " prompts");
  }
  for (std::size_t row = 0; row < batch.size(); ++row) {
    const std::int64_t slot = bank.slot(names[names.size() == 1 ? 0 : row]);
    if (slot != base_model && slot != filled && !bank.taken(slot)) {
      throw Error(Exit::input, "--adapter: slot " + std::to_string(slot) + " is empty; there are " + bank.all_names());
    }
    batch[row].adapter = slot;
  }
  return batch;
}

void answer(Decoder& decoder, const Artifact& artifact, const std::vector<Request>& batch, std::size_t count) {
  const Answer answer = decode_greedily(decoder, artifact, batch, count);
  for (std::size_t row = 0; row < batch.size(); ++row) {
    const std::vector<std::int64_t>& tokens = answer.tokens[row];
    for (std::size_t i = 0; i < tokens.size(); ++i) std::cout << (i ? " " : "") << tokens[i];
    std::cout << std::endl;
    std::fprintf(stderr, "%zu prompt tokens, %zu new\n", batch[row].prompt.size(), tokens.size());
  }
  std::fprintf(stderr, "first tokens after %.1f ms, then %.2f ms a step (TPOT)\n", answer.time_to_first_token * 1e3,
               answer.time_per_output_token * 1e3);
}

void run(const Options& options) {
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    throw Error(Exit::runtime, std::string("the headers are newer than the library, ONNX Runtime ") + OrtGetApiBase()->GetVersionString());
  }
  const Artifact artifact = open_artifact(options.out, "onnxruntime", "cpu");
  check_runtime(artifact, OrtGetApiBase()->GetVersionString());
  const std::vector<GoldenPrompt> recorded = read_golden(artifact);

  std::optional<Stack> stack;  // it outlives the decoder
  std::pair<std::int64_t, std::string> swap{base_model, ""};
  if (!options.swap.empty()) {
    stack.emplace(artifact);
    swap = parse_swap(options.swap, *artifact.bank);
  }
  const std::vector<Request> batch = requests_of(options, artifact, recorded, swap.first);
  Decoder decoder(artifact, options.threads, stack ? &*stack : nullptr);

  for (const GoldenPrompt& golden : recorded) {
    const double error = replay(decoder, artifact, golden);
    std::fprintf(stderr, "golden prompt of %zu tokens, %zu steps: the largest error is %.3g %% of what is allowed\n",
                 golden.request.prompt.size(), golden.tokens.size(), 100 * error);
    if (!(error <= 1)) throw Error(Exit::failed, "golden vectors do not replay: this machine does not compute what was recorded");
  }

  answer(decoder, artifact, batch, options.tokens);
  if (!stack) return;
  const auto& [slot, file] = swap;
  Layers layers;
  try {
    layers = read_adapter(file, artifact, *stack);
  } catch (const Error&) {  // nothing was written: the answers are those of before
    answer(decoder, artifact, batch, options.tokens);
    throw;
  }
  for (const char* done : {"has the new adapter", "has what it had before"}) {
    stack->exchange(slot, layers);
    std::fprintf(stderr, "slot %lld %s\n", static_cast<long long>(slot), done);
    answer(decoder, artifact, batch, options.tokens);
  }
}

int fail(Exit code, const char* message) {
  std::fprintf(stderr, "error: %s\n", message);
  return static_cast<int>(code);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const std::vector<std::string> words(arguments + 1, arguments + count);
    if (words == std::vector<std::string>{"--help"}) {
      std::cout << usage;
      return 0;
    }
    run(parse_options(words));
    return 0;
  } catch (const Error& error) {
    return fail(error.code, error.what());
  } catch (const Ort::Exception& error) {
    return fail(Exit::runtime, error.what());
  } catch (const std::exception& error) {  // a file that cannot be read, no memory
    return fail(Exit::runtime, error.what());
  }
}
