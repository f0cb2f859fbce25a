#include "base/safetensors.h"

#include <cstring>
#include <numeric>

#include "base/json.h"
#include "base/random.h"
#include "base/testing.h"

namespace megalodon {
namespace {

using testing::contains;
using testing::request_error;
using testing::TemporaryFolder;
using testing::work_error;

std::string file_of(std::string_view header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file.append(header).append(data_bytes, '\0');
}

SafetensorsHeader parse(std::string_view file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "x");
}

std::string refusal(std::string_view header, std::size_t data_bytes) {
  return request_error([&] { parse(file_of(header, data_bytes)); });
}

std::string entry(std::string_view type, std::string_view shape, std::string_view offsets) {
  return std::string("{\"dtype\":\"")
             .append(type)
             .append("\",\"shape\":")
             .append(shape)
             .append(",\"data_offsets\":")
             .append(offsets) +
         "}";
}

TEST(Safetensors, Parses) {
  const auto header = parse(file_of(R"({"__metadata__":{"k":"v"},"b":)" + entry("BF16", "[2,3]", "[4,16]") +
                                        ",\"a\":" + entry("F32", "[]", "[0,4]") +
                                        ",\"none\":" + entry("I64", "[0,5]", "[4,4]") + "}   ",
                                    12 + 4));
  EXPECT_EQ(header.metadata.at("k"), "v");
  ASSERT_EQ(header.tensors.size(), 3u);
  const TensorInfo& b = header.tensors.at("b");
  EXPECT_EQ(b.type, TensorType::bf16);
  EXPECT_EQ(b.shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(b.begin, 4u);
  EXPECT_EQ(b.end, 16u);
  EXPECT_TRUE(parse(file_of("{}", 0)).tensors.empty());
}

TEST(Safetensors, RefusesBadFrames) {
  EXPECT_TRUE(
      contains(request_error([] { parse(""); }), "malformed safetensors file (x): the file is empty"));
  EXPECT_TRUE(contains(request_error([] { parse("1234567"); }), "shorter than the 8 bytes"));
  std::string file = file_of("{}", 0);
  file[0] = 3;
  EXPECT_TRUE(contains(request_error([&] { parse(file); }), "a header of 3 bytes in a file of 10"));
  std::memset(file.data(), 0xff, 8);
  EXPECT_TRUE(contains(request_error([&] { parse(file); }), "more than 100 MB"));
  EXPECT_TRUE(contains(refusal("", 4), "does not begin with '{'"));
  EXPECT_TRUE(contains(refusal(" {}", 0), "does not begin with '{'"));
  EXPECT_TRUE(contains(refusal("[]", 0), "does not begin with '{'"));
  EXPECT_TRUE(contains(refusal("{}x", 0), "invalid JSON at byte 10"));
  EXPECT_TRUE(contains(refusal("{} {}", 0), "invalid JSON"));
  EXPECT_TRUE(contains(refusal("{", 0), "invalid JSON"));
  EXPECT_TRUE(contains(refusal(std::string_view("{}\0{}", 5), 0), "a zero byte in the header"));
  EXPECT_TRUE(contains(refusal("{\"\xff\":1}", 0), "invalid JSON"));
  EXPECT_TRUE(contains(refusal("{" + std::string(1'000'000, '['), 0), "invalid JSON"));
  EXPECT_TRUE(
      contains(refusal("{\"a\":" + std::string(1'000'000, '['), 0), "expected an object, got an array"));
}

struct Refused {
  const char* shape;
  const char* offsets;
  std::size_t data_bytes;
  const char* message;
};

TEST(Safetensors, RefusesShapesAndOffsets) {
  const Refused cases[] = {
      {"[4194305,4194305,211106198978564]", "[0,16]", 16, "shape too large"},  // the product wraps to 4
      {"[4294967296,4294967296]", "[0,0]", 0, "shape too large"},              // ... to 0
      {"[0,4294967296,4294967296]", "[0,0]", 0, "shape too large"},
      {"[9223372036854775807]", "[0,4]", 4, "shape too large"},
      {"[9223372036854775808]", "[0,4]", 4, "beyond 63 bits"},
      {"[18446744073709551617]", "[0,4]", 4, "no integer"},
      {"[-1]", "[0,4]", 4, "shape: expected a size, got a negative number"},
      {"[1.0]", "[0,4]", 4, "no integer"},
      {"[1e0]", "[0,4]", 4, "no integer"},
      {"[\"1\"]", "[0,4]", 4, "got a string"},
      {"[[1]]", "[0,4]", 4, "got an array"},
      {"[{}]", "[0,4]", 4, "got an object"},
      {"[true]", "[0,4]", 4, "got a boolean"},
      {"null", "[0,4]", 4, "null"},
      {"1", "[0,4]", 4, "a number"},
      {"[1]", "[4,0]", 4, "out of order"},
      {"[1]", "[0,8]", 4, "but the file holds 4; is it truncated?"},
      {"[1]", "[0,3]", 3, "the shape needs 4 bytes, data_offsets give 3"},
      {"[2]", "[0,4]", 4, "the shape needs 8 bytes, data_offsets give 4"},
      {"[1]", "[0,4]", 5, "1 bytes at the end belong to no tensor"},
      {"[1]", "[1,5]", 5, "a hole of 1 bytes before it"},
      {"[1]", "[0]", 4, "not two numbers"},
      {"[1]", "[0,4,4]", 4, "data_offsets: expected two offsets"},
      {"[1]", "[-4,0]", 4, "data_offsets: expected two offsets, got a negative number"},
      {"[1]", "[18446744073709551612,18446744073709551615]", 4, "beyond 63 bits"},
  };
  for (const auto& [shape, offsets, data_bytes, message] : cases) {
    const std::string got = refusal("{\"a\":" + entry("F32", shape, offsets) + "}", data_bytes);
    EXPECT_TRUE(contains(got, message)) << shape << ' ' << offsets;
    EXPECT_TRUE(contains(got, "(x): ")) << got;
  }
  std::string dimensions = "[1";
  for (int i = 0; i < 64; ++i) dimensions += ",1";
  EXPECT_TRUE(
      contains(refusal("{\"a\":" + entry("F32", dimensions + "]", "[0,4]") + "}", 4), "64 dimensions"));
}

TEST(Safetensors, RefusesOverlapsHolesAndRepeats) {
  const std::string a = "\"a\":" + entry("U8", "[4]", "[0,4]");
  EXPECT_TRUE(contains(refusal("{" + a + ",\"b\":" + entry("U8", "[4]", "[2,6]") + "}", 6), "'b': overlaps"));
  EXPECT_TRUE(contains(refusal("{" + a + ",\"b\":" + entry("U8", "[4]", "[0,4]") + "}", 4), "overlaps"));
  EXPECT_TRUE(
      contains(refusal("{" + a + ",\"b\":" + entry("U8", "[4]", "[5,9]") + "}", 9), "'b': a hole of 1"));
  EXPECT_TRUE(contains(refusal("{" + a + "," + a + "}", 4), "entry 'a' twice"));
  EXPECT_TRUE(contains(refusal(R"({"__metadata__":{},"__metadata__":{}})", 0), "entry '__metadata__' twice"));
  EXPECT_TRUE(contains(refusal(R"({"__metadata__":{"k":"1","k":"2"}})", 0), "metadata 'k' twice"));
  EXPECT_TRUE(
      contains(refusal(R"({"__metadata__":{"k":1}})", 0), "metadata 'k': expected a string, got a number"));
  EXPECT_TRUE(contains(refusal(R"({"__metadata__":[]})", 0), "expected an object, got an array"));
}

TEST(Safetensors, RefusesBadEntries) {
  EXPECT_TRUE(contains(refusal("{\"a\":" + entry("F8_E4M3", "[4]", "[0,4]") + "}", 4),
                       "unknown element type 'F8_E4M3'"));
  EXPECT_TRUE(contains(refusal("{\"a\":{}}", 0), "no field 'dtype'"));
  EXPECT_TRUE(contains(refusal(R"({"a":{"dtype":"U8","shape":[0]}})", 0), "no field 'data_offsets'"));
  EXPECT_TRUE(contains(refusal(R"({"a":{"dtype":"U8","dtype":"U8"}})", 0), "field 'dtype' twice"));
  EXPECT_TRUE(contains(refusal(R"({"a":{"shape":[1],"shape":[2]}})", 0), "field 'shape' twice"));
  EXPECT_TRUE(contains(refusal(R"({"a":{"extra":1}})", 0), "unknown field 'extra'"));
  EXPECT_TRUE(contains(refusal(R"({"a":{"dtype":["U8"]}})", 0), "unexpected an array"));
  EXPECT_TRUE(contains(refusal(R"({"a":1})", 0), "entry 'a': expected an object, got a number"));
  EXPECT_LT(refusal("{\"" + std::string(100'000, 'n') + "\":1}", 0).size(), 250u);
}

TEST(Safetensors, EntriesAreBounded) {
  const auto with = [](int entries) {
    std::string header = "{";
    for (int i = 0; i < entries; ++i) {
      if (i > 0) header += ',';
      header += "\"t" + std::to_string(i) +
                "\":" + entry("U8", "[1]", "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
    }
    return file_of(header + "}", static_cast<std::size_t>(entries));
  };
  EXPECT_EQ(parse(with(100'000)).tensors.size(), 100'000u);
  EXPECT_TRUE(contains(request_error([&] { parse(with(100'001)); }), "more than 100,000 tensors"));
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string file =
      file_of("{\"a\":" + entry("F32", "[2]", "[0,8]") + ",\"b\":" + entry("U8", "[3]", "[8,11]") + "}", 11);
  EXPECT_NO_THROW(parse(file));
  for (std::size_t size = 0; size < file.size(); ++size) {
    EXPECT_THROW(parse(std::string_view(file).substr(0, size)), Error) << size;
  }
}

TEST(Safetensors, WrittenFilesReadBack) {
  const TemporaryFolder folder;
  const auto path = folder / "x.safetensors";
  std::vector<float> numbers(6);
  std::iota(numbers.begin(), numbers.end(), 0.5f);
  const std::vector<std::int64_t> ids{7, -8};
  const TensorBytes tensors[] = {
      {"z \"quoted\" é", TensorType::f32, {2, 3}, std::as_bytes(std::span(numbers))},
      {"ids", TensorType::i64, {2}, std::as_bytes(std::span(ids))},
      {"empty", TensorType::bool_, {0}, {}},
  };
  write_safetensors(path, tensors, {{"format", "pt"}, {"note", "a\nb"}});

  const SafetensorsFile file(path);
  EXPECT_EQ(file.header().metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"note", "a\nb"}}));
  EXPECT_EQ(file.header().data_offset % 64, 0u);
  ASSERT_EQ(file.header().tensors.size(), 3u);
  EXPECT_EQ(file.info(tensors[0].name).begin, 0u);
  for (const TensorBytes& tensor : tensors) {
    EXPECT_TRUE(file.has(tensor.name));
    EXPECT_EQ(file.info(tensor.name).shape, tensor.shape);
    EXPECT_EQ(file.info(tensor.name).type, tensor.type);
    const auto data = file.data(tensor.name);
    ASSERT_EQ(data.size(), tensor.data.size());
    EXPECT_TRUE(std::equal(data.begin(), data.end(), tensor.data.begin()));
  }
  EXPECT_FALSE(file.has("none"));
  EXPECT_TRUE(contains(request_error([&] { file.data("idz"); }), "no tensor 'idz'"));
  EXPECT_TRUE(contains(request_error([&] { file.info("idz"); }), "the nearest is 'ids'"));
}

TEST(Safetensors, WriterChecksItsTensors) {
  const TemporaryFolder folder;
  const std::vector<std::byte> data(4);
  const TensorBytes good{"a", TensorType::u8, {4}, data};
  const TensorBytes twice[] = {good, good};
  EXPECT_TRUE(contains(work_error([&] { write_safetensors(folder / "x", twice); }), "its name is taken"));
  const TensorBytes odd[] = {{"a", TensorType::f32, {4}, data}};
  EXPECT_TRUE(contains(work_error([&] { write_safetensors(folder / "x", odd); }), "do not fit its shape"));
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Safetensors, TypesHaveNamesAndSizes) {
  EXPECT_EQ(name_of(TensorType::bool_), "BOOL");
  EXPECT_EQ(name_of(TensorType::bf16), "BF16");
  EXPECT_EQ(name_of(TensorType::f64), "F64");
  EXPECT_EQ(size_of(TensorType::bf16), 2u);
  EXPECT_EQ(size_of(TensorType::i64), 8u);
}

}  // namespace
}  // namespace megalodon
