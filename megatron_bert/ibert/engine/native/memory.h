// SPDX-License-Identifier: Apache-2.0
// Aligned memory, and the contents of files.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "model.h"

namespace ibert {

// Memory that begins at a multiple of 64 bytes, zeroed; it only grows. Large blocks come from the system, which zeroes them,
// with large pages where Linux gives them: a pass reads every weight once, and with pages of 4 KB looking up addresses costs
// as much as the memory.
class Block {
 public:
  ~Block() { release(); }
  Block() = default;
  Block(const Block&) = delete;
  uint8_t* of(size_t bytes) {
    if (bytes > size_) {
      release();
      at_ = bytes >= LARGE_PAGE ? mapped(bytes) : allocated(bytes);
      size_ = bytes;
    }
    return at_;
  }
  uint8_t* data() const { return at_; }

 private:
  static constexpr size_t LARGE_PAGE = size_t(1) << 21;
  uint8_t* at_ = nullptr;
  size_t size_ = 0;

  static uint8_t* allocated(size_t bytes) {
    const size_t whole = rounded_up(bytes, 64);
    auto* at = static_cast<uint8_t*>(std::aligned_alloc(64, whole));
    if (!at) throw std::bad_alloc();
    std::memset(at, 0, whole);
    return at;
  }
  static uint8_t* mapped(size_t bytes) {
    const size_t whole = rounded_up(bytes, LARGE_PAGE);
    void* map = mmap(nullptr, whole + LARGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<uint8_t*>(map);
    const size_t before = rounded_up(reinterpret_cast<uintptr_t>(begin), LARGE_PAGE) - reinterpret_cast<uintptr_t>(begin);
    if (before) munmap(begin, before);
    munmap(begin + before + whole, LARGE_PAGE - before);
#if defined(__linux__)
    madvise(begin + before, whole, MADV_HUGEPAGE);
#endif
    return begin + before;
  }
  void release() {
    if (size_ >= LARGE_PAGE)
      munmap(at_, rounded_up(size_, LARGE_PAGE));
    else
      std::free(at_);
    at_ = nullptr;
    size_ = 0;
  }
};

// The contents of a file, mapped while all of them are read, and read piece by piece later.
class File {
 public:
  explicit File(const std::string& path) : file_(std::fopen(path.c_str(), "rb"), std::fclose) {
    const long end = file_ && std::fseek(file_.get(), 0, SEEK_END) == 0 ? std::ftell(file_.get()) : -1;
    if (end < 0) throw std::runtime_error("cannot open " + path);
    size_ = size_t(end);
    if (size_ == 0) return;
    void* map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fileno(file_.get()), 0);
    if (map == MAP_FAILED) throw std::runtime_error("cannot read " + path);
    data_ = static_cast<uint8_t*>(map);
  }
  ~File() { unmap(); }
  File(const File&) = delete;
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Whatever has been read so far is not the process's memory any more; it comes back from the file where it is used.
  void forget() const {
    if (data_) madvise(data_, size_, MADV_DONTNEED);
  }
  void unmap() {
    if (data_) munmap(data_, size_);
    data_ = nullptr;
  }
  // Unlike a page of a mapped file, around which the system maps others, a piece costs no memory.
  void read(size_t at, void* to, size_t bytes) const {
    if (pread(fileno(file_.get()), to, bytes, off_t(at)) != ssize_t(bytes))
      throw std::runtime_error("cannot read a plan's file");
  }

 private:
  std::unique_ptr<FILE, int (*)(FILE*)> file_;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ibert
