package host

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// packTree makes a tar archive, compressed with zstd, of the files and directories below
// root. Names of one file stay names of one file: storage daemons that have taken a
// file have several for it.
func packTree(t *testing.T, root string) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(zstd.MaxWindowSize>>3))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	first := map[uint64]string{} // the first name of a file that has several, by inode
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		h := &tar.Header{Name: rel, Mode: int64(info.Mode().Perm())}
		switch {
		case d.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, rel+"/"
			return w.WriteHeader(h)
		case !d.Type().IsRegular():
			t.Errorf("%s is neither a file nor a directory: %v", name, d.Type())
			return nil
		case first[st.Ino] != "":
			h.Typeflag, h.Linkname = tar.TypeLink, first[st.Ino]
			return w.WriteHeader(h)
		}
		if st.Nlink > 1 {
			first[st.Ino] = rel
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		h.Typeflag, h.Size = tar.TypeReg, int64(len(b))
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// unpackTree is the reverse of packTree; blocks of zeroes become holes.
func unpackTree(t *testing.T, root string, packed []byte) {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderMaxWindow(zstd.MaxWindowSize))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(root, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.Mkdir(strings.TrimSuffix(name, "/"), fs.FileMode(h.Mode))
		case tar.TypeLink:
			err = os.Link(filepath.Join(root, h.Linkname), name)
		default:
			err = unpackFile(name, fs.FileMode(h.Mode), h.Size, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func unpackFile(name string, mode fs.FileMode, size int64, r io.Reader) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer f.Close()
	block, zeroes := make([]byte, 4096), make([]byte, 4096)
	for off := int64(0); off < size; off += int64(len(block)) {
		p := block[:min(int64(len(block)), size-off)]
		if _, err := io.ReadFull(r, p); err != nil {
			return err
		}
		if bytes.Equal(p, zeroes[:len(p)]) {
			continue
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Truncate(size)
}
