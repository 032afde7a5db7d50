// Api is the demo's middle tier: GET /stock answers what PostgreSQL has in stock.
//
//	api LISTEN DATABASE-URL
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: api LISTEN DATABASE-URL")
	}
	http.HandleFunc("GET /stock", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
		defer cancel()
		if err := stock(ctx, os.Args[2], w); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
		}
	})
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}

// stock asks over a connection of its own, so that each request is a crossing.
func stock(ctx context.Context, database string, w http.ResponseWriter) error {
	c, err := pgx.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	rows, err := c.Query(ctx, "SELECT item, amount FROM stock ORDER BY item")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var item string
		var amount int
		if err := rows.Scan(&item, &amount); err != nil {
			return err
		}
		fmt.Fprintf(w, "%s: %d\n", item, amount)
	}
	return rows.Err()
}
