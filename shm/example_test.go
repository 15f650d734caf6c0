package shm_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/rs/zerolog"

	"scoria/driver/block/blocktest"
	"scoria/shm"
	"scoria/shm/client"
	"scoria/shm/worker"
)

// serve runs a server over one volume, default/vm1, in RAM, in place of scoriad.
func serve() (socket string, stop func()) {
	dir, err := os.MkdirTemp("", "shm-example-")
	if err != nil {
		log.Fatal(err)
	}
	socket = filepath.Join(dir, "shm.sock")
	ram := blocktest.NewRAM(16<<20, blocktest.Options{Name: "default/vm1"})
	pool := &blocktest.Pool{}
	pool.Add(ram)
	set, err := worker.NewSet(worker.Config{})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		log.Fatal(err)
	}
	server := shm.NewServer(shm.Config{Opener: pool, Set: set, Log: zerolog.Nop()})
	go server.Serve(l)
	return socket, func() {
		server.Close()
		set.Close()
		ram.Close()
		os.RemoveAll(dir)
	}
}

// A volume is an io.ReaderAt and an io.WriterAt.
func Example() {
	socket, stop := serve()
	defer stop()
	ctx := context.Background()

	disk, err := client.Open(ctx, client.Options{Socket: socket, Volume: "default/vm1"})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	block := make([]byte, disk.Info().LogicalBlock)
	copy(block, "hello")
	if _, err := disk.WriteAt(block, 4096); err != nil {
		log.Fatal(err)
	}
	if err := disk.Flush(ctx); err != nil { // survives a loss of power from here on
		log.Fatal(err)
	}
	text, err := io.ReadAll(io.NewSectionReader(disk, 4096, 5))
	fmt.Println(string(text), err)
	// Output: hello <nil>
}

// Many requests at once, on memory that is not copied.
func Example_asynchronous() {
	socket, stop := serve()
	defer stop()
	ctx := context.Background()
	disk, err := client.Open(ctx, client.Options{Socket: socket, Volume: "default/vm1"})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	var under sync.WaitGroup
	for i := range 8 {
		data, err := disk.Alloc(ctx, 4096)
		if err != nil {
			log.Fatal(err)
		}
		data[0] = byte('a' + i)
		under.Add(1)
		op := &client.Op{Kind: client.Write, Offset: uint64(i) * 4096, Data: data, Done: func(op *client.Op) {
			if err := op.Err(); err != nil {
				log.Print(err)
			}
			disk.Free(op.Data)
			under.Done()
		}}
		if err := disk.Start(ctx, op); err != nil {
			log.Fatal(err)
		}
	}
	under.Wait()

	first := make([]byte, 1)
	for i := range int64(8) {
		if _, err := disk.ReadAt(first, i*4096); err != nil {
			log.Fatal(err)
		}
		fmt.Print(string(first))
	}
	// Output: abcdefgh
}

// Volumes are made, listed and resized over a connection of its own.
func ExampleServer_control() {
	socket, stop := serve()
	defer stop()
	ctx := context.Background()
	c, err := client.Dial(ctx, socket)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(ctx, "default/vm2", 1<<20); err != nil {
		log.Fatal(err)
	}
	if err := c.Resize(ctx, "default/vm2", 2<<20); err != nil {
		log.Fatal(err)
	}
	names, err := c.List(ctx)
	if err != nil {
		log.Fatal(err)
	}
	v, err := c.Stat(ctx, "default/vm2")
	fmt.Println(names, v.Size, err)
	// Output: [default/vm1 default/vm2] 2097152 <nil>
}
