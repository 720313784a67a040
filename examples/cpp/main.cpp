// Opens an artifact, proves that it computes here what was recorded when it was built, and decodes greedily.

#include <charconv>
#include <cstdio>
#include <iostream>
#include <sstream>

#include "artifact.hpp"
#include "decoder.hpp"
#include "error.hpp"
#include "golden.hpp"

namespace {

constexpr char usage[] =
    "usage: flora-decode OUT [--prompt ID,ID,...]... [--tokens N] [--threads N]\n"
    "\n"
    "Checks OUT, a directory that `flora-export build` wrote, replays its golden vectors, and decodes greedily.\n"
    "Prints a line of token ids for each prompt, and times on stderr.\n"
    "\n"
    "  --prompt   token ids; without it, the recorded prompts\n"
    "  --tokens   how many to decode at most (16)\n"
    "  --threads  of one operator; 0 leaves it to ONNX Runtime (0)\n"
    "\n"
    "Exit codes: 0 done; 1 the golden vectors do not replay; 2 wrong use or a damaged artifact; 3 ONNX Runtime failed.\n";

struct Options {
  std::string out;
  std::vector<std::vector<std::int64_t>> prompts;
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

void run(const Options& options) {
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    throw Error(Exit::runtime, std::string("the headers are newer than the library, ONNX Runtime ") + OrtGetApiBase()->GetVersionString());
  }
  const Artifact artifact = open_artifact(options.out, "onnxruntime", "cpu");
  check_runtime(artifact, OrtGetApiBase()->GetVersionString());
  Decoder decoder(artifact, options.threads);

  std::vector<std::vector<std::int64_t>> prompts = options.prompts;
  const std::vector<GoldenPrompt> recorded = read_golden(artifact);
  for (const GoldenPrompt& golden : recorded) {
    const double error = replay(decoder, artifact, golden);
    std::fprintf(stderr, "golden prompt of %zu tokens, %zu steps: the largest error is %.3g %% of what is allowed\n", golden.prompt.size(),
                 golden.tokens.size(), 100 * error);
    if (!(error <= 1)) throw Error(Exit::failed, "golden vectors do not replay: this machine does not compute what was recorded");
    if (options.prompts.empty()) prompts.push_back(golden.prompt);
  }

  for (const std::vector<std::int64_t>& prompt : prompts) {
    const Answer answer = decode_greedily(decoder, artifact, prompt, options.tokens);
    for (std::size_t i = 0; i < answer.tokens.size(); ++i) std::cout << (i ? " " : "") << answer.tokens[i];
    std::cout << std::endl;
    std::fprintf(stderr, "%zu prompt tokens, %zu new; first after %.1f ms, then %.2f ms each (TPOT)\n", prompt.size(), answer.tokens.size(),
                 answer.time_to_first_token * 1e3, answer.time_per_output_token * 1e3);
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
