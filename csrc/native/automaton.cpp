// Aho-Corasick over bytes: which phrases occur in the bytes that generated tokens add to a text.
//
// One transition per byte through a dense table (states x 256 int32: 42 phrases of 20 bytes are 0.9 MB). States are plain integers, so a trie of
// samples carries one per node: 0 start, kMatch absorbs, kDead (anchored search only) means that no phrase can come any more. The same
// machine in Python is llmcore.phrases.PyAutomaton; tests compare the two over random tokens.
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <pybind11/stl.h>

#include "native.h"

namespace py = pybind11;

namespace {

class PhraseAutomaton {
  public:
    static constexpr int32_t kMatch = -1, kDead = -2;

    PhraseAutomaton(const std::vector<py::bytes>& patterns, bool anchored) {
        const int32_t none = anchored ? kDead : 0;
        std::vector<std::array<int32_t, 256>> next(1);
        next[0].fill(0);  // 0 = no edge: nothing leads back to the start by an edge
        std::vector<char> final(1, 0);
        for (const auto& pattern : patterns) {
            const std::string_view text = pattern;
            if (text.empty()) throw std::invalid_argument("patterns must not be empty");
            int32_t state = 0;
            for (const char c : text) {
                const auto byte = static_cast<uint8_t>(c);
                if (next[state][byte] == 0) {
                    next[state][byte] = static_cast<int32_t>(next.size());
                    next.emplace_back().fill(0);
                    final.push_back(0);
                }
                state = next[state][byte];
            }
            final[state] = 1;
        }
        table_.assign(next.size(), {});
        std::vector<int32_t> fail(next.size(), 0), queue{0};
        table_[0].fill(none);
        // Breadth first: the failure state of a state is shorter, hence complete, before the state itself is.
        for (size_t head = 0; head < queue.size(); ++head) {
            const int32_t state = queue[head];
            if (state != 0) {
                if (anchored) table_[state].fill(none);
                else table_[state] = table_[fail[state]];
            }
            for (int byte = 0; byte < 256; ++byte) {
                const int32_t target = next[state][byte];
                if (target == 0) continue;
                if (!anchored && state != 0) fail[target] = table_[fail[state]][byte];
                if (!anchored && final[fail[target]]) final[target] = 1;
                queue.push_back(target);
            }
            for (int byte = 0; byte < 256; ++byte)
                if (next[state][byte] != 0) table_[state][byte] = next[state][byte];
        }
        if (anchored)
            for (const uint8_t blank : {' ', '\t', '\r', '\n'})
                if (next[0][blank] == 0) table_[0][blank] = 0;
        for (auto& row : table_)
            for (auto& target : row)
                if (target > 0 && final[target]) target = kMatch;
    }

    int32_t walk(int32_t state, std::string_view data) const {
        if (state >= static_cast<int32_t>(table_.size())) throw std::out_of_range("state must come from this automaton");
        for (const char c : data) {
            if (state < 0) return state;
            state = table_[state][static_cast<uint8_t>(c)];
        }
        return state;
    }

    void set_tokens(const std::vector<py::bytes>& tokens) {
        bytes_.clear();
        begin_.assign(1, 0);
        begin_.reserve(tokens.size() + 1);
        for (const auto& token : tokens) {
            bytes_ += std::string_view(token);
            begin_.push_back(bytes_.size());
        }
    }

    int32_t walk_token(int32_t state, int64_t token) const {
        if (token < 0 || token + 1 >= static_cast<int64_t>(begin_.size())) return state;
        return walk(state, std::string_view(bytes_).substr(begin_[token], begin_[token + 1] - begin_[token]));
    }

  private:
    std::vector<std::array<int32_t, 256>> table_;
    std::string bytes_;
    std::vector<size_t> begin_{0};
};

}  // namespace

namespace llmcore {

void register_automaton(py::module_& m) {
    py::class_<PhraseAutomaton>(m, "PhraseAutomaton", "Aho-Corasick over bytes; see llmcore.phrases")
        .def(py::init<const std::vector<py::bytes>&, bool>(), py::arg("patterns"), py::arg("anchored"))
        .def("walk", [](const PhraseAutomaton& self, int32_t state, const py::bytes& data) { return self.walk(state, data); },
             py::arg("state"), py::arg("data"))
        .def("set_tokens", &PhraseAutomaton::set_tokens, py::arg("tokens"))
        .def("walk_token", &PhraseAutomaton::walk_token, py::arg("state"), py::arg("token_id"));
}

}  // namespace llmcore
