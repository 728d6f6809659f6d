// SPDX-License-Identifier: Apache-2.0
// Aligned memory, and the contents of files.
#pragma once
#include <sys/mman.h>

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

// Memory that begins at a multiple of 64 bytes, zeroed; it only grows. Large blocks have large pages where Linux gives them:
// a pass reads every weight once, and with pages of 4 KB looking up addresses costs as much as the memory.
class Block {
 public:
  ~Block() { std::free(at_); }
  Block() = default;
  Block(const Block&) = delete;
  uint8_t* of(size_t bytes) {
    if (bytes > size_) {
      std::free(at_);
      size_ = 0;
      const size_t page = bytes >= LARGE_PAGE ? LARGE_PAGE : 64, whole = rounded_up(bytes, page);
      at_ = static_cast<uint8_t*>(std::aligned_alloc(page, whole));
      if (!at_) throw std::bad_alloc();
#if defined(__linux__)
      if (page == LARGE_PAGE) madvise(at_, whole, MADV_HUGEPAGE);
#endif
      size_ = bytes;
      std::memset(at_, 0, whole);
    }
    return at_;
  }
  uint8_t* data() const { return at_; }

 private:
  static constexpr size_t LARGE_PAGE = size_t(1) << 21;
  uint8_t* at_ = nullptr;
  size_t size_ = 0;
};

// The contents of a file, mapped: packing reads every byte once, and what is used later is shared with other processes.
class File {
 public:
  explicit File(const std::string& path) {
    std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    const long end = file && std::fseek(file.get(), 0, SEEK_END) == 0 ? std::ftell(file.get()) : -1;
    if (end < 0) throw std::runtime_error("cannot open " + path);
    size_ = size_t(end);
    if (size_ == 0) return;
    void* map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fileno(file.get()), 0);
    if (map == MAP_FAILED) throw std::runtime_error("cannot read " + path);
    data_ = static_cast<uint8_t*>(map);
  }
  ~File() {
    if (data_) munmap(data_, size_);
  }
  File(const File&) = delete;
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Whatever has been read so far is not the process's memory any more; it comes back from the file where it is used.
  void forget() const {
    if (data_) madvise(data_, size_, MADV_DONTNEED);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ibert
