// A reader for the JSON of manifests and safetensors headers: no escapes but \" and \\ are needed there.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
  double number = 0;  // of a Bool 0 or 1
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& key) const {
    auto found = fields.find(key);
    if (found == fields.end()) throw std::runtime_error("JSON has no field " + key);
    return found->second;
  }

  static Json parse(const std::string& source) {
    const char* at = source.c_str();
    return value(at);
  }

 private:
  static void skip(const char*& at) {
    while (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r' || *at == ',' || *at == ':') ++at;
  }

  static std::string string(const char*& at) {
    std::string found;
    for (++at; *at != '"'; ++at) {
      if (*at == '\0') throw std::runtime_error("JSON ends in a string");
      if (*at == '\\') ++at;
      found += *at;
    }
    ++at;
    return found;
  }

  static Json value(const char*& at) {
    skip(at);
    Json found;
    if (*at == '{') {
      found.kind = Object;
      for (skip(++at); *at != '}'; skip(at)) {
        std::string key = string(at);
        found.fields[key] = value(at);
      }
      ++at;
    } else if (*at == '[') {
      found.kind = Array;
      for (skip(++at); *at != ']'; skip(at)) found.items.push_back(value(at));
      ++at;
    } else if (*at == '"') {
      found.kind = String;
      found.text = string(at);
    } else if (*at == 't' || *at == 'f') {
      found.kind = Bool;
      found.number = *at == 't';
      at += *at == 't' ? 4 : 5;
    } else if (*at == 'n') {
      at += 4;
    } else {
      char* end;
      found.kind = Number;
      found.number = std::strtod(at, &end);
      if (end == at) throw std::runtime_error("JSON has a value that is none");
      at = end;
    }
    return found;
  }
};
